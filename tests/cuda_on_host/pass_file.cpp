#include "pass_file.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

#include "race_check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) ((void)(begin), (void)(size))
#endif

namespace {

constexpr std::size_t kAlignment = 512;  // that of PyTorch's allocator
constexpr std::size_t kLarge = std::size_t{1} << 30;

}  // namespace

void refuse(const std::string& why) {
  std::cerr << "run_pass: " << why << "\n";
  std::exit(2);
}

bool Buffer::is_large() const { return size > kLarge; }

void Buffer::allocate(std::size_t misaligned_by) {
  if (size == 0) return;  // as PyTorch's allocator has it
  if (is_large()) {
    void* mapping = mmap(nullptr, misaligned_by + size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) refuse("no address space for " + name);
    data = static_cast<std::byte*>(mapping) + misaligned_by;
    return;
  }
  void* allocation = nullptr;
  if (posix_memalign(&allocation, kAlignment, misaligned_by + size) != 0) refuse("no memory");
  data = static_cast<std::byte*>(allocation) + misaligned_by;
  ASAN_POISON_MEMORY_REGION(allocation, misaligned_by);
  cuda_on_host::race_check::watch_global(data, size, name);
}

void Buffer::fill() {
  if (size == 0) return;
  if (!read && !is_large()) std::memset(data, kPoison, size);
  for (const Piece& piece : pieces) {
    std::memcpy(data + piece.begin, piece.bytes.data(), piece.bytes.size());
  }
}

void Buffer::write_to(std::ostream& results) const {
  const auto* bytes = reinterpret_cast<const char*>(data);
  if (!is_large()) results.write(bytes, static_cast<std::streamsize>(size));
  for (const Piece& piece : pieces) {
    if (!is_large()) break;
    results.write(bytes + piece.begin, static_cast<std::streamsize>(piece.bytes.size()));
  }
}

void Buffer::forbid(std::size_t begin, std::size_t end) {
  cuda_on_host::race_check::forbid(data + begin, end - begin);
  // AddressSanitizer keeps one byte for eight: what does not fill eight is left readable there.
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (address + begin + 7) / 8 * 8;
  const std::uintptr_t last = end == size ? address + end : (address + end) / 8 * 8;
  if (first < last) ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(first), last - first);
}

Buffer& Description::buffer(const std::string& name) {
  for (Buffer& each : buffers) {
    if (each.name == name) return each;
  }
  refuse("no buffer " + name);
}

namespace {

fcrn::DType parse_dtype(const std::string& name) {
  if (name == "float64") return fcrn::DType::float64;
  if (name == "float32") return fcrn::DType::float32;
  if (name == "float16") return fcrn::DType::float16;
  if (name == "bfloat16") return fcrn::DType::bfloat16;
  if (name == "bool") return fcrn::DType::boolean;
  refuse("dtype " + name);
}

// operator>> does not read the hexadecimal floating-point numbers that Python writes.
double parse_double(std::istream& words) {
  std::string word;
  words >> word;
  return std::strtod(word.c_str(), nullptr);
}

fcrn::TensorView* find_view(fcrn::LossPass& pass, const std::string& name) {
  if (name == "pred") return &pass.pred;
  if (name == "target") return &pass.target;
  if (name == "errors") return &pass.errors;
  if (name == "grad") return &pass.grad;
  if (name == "grad_output") return &pass.grad_output;
  if (name == "weight") return &pass.weight;
  if (name == "positive") return &pass.positive;
  return nullptr;
}

void parse_buffer(Description& description, std::istream& words) {
  Buffer& buffer = description.buffers.emplace_back();
  std::string dtype;
  std::size_t elements = 0, misaligned_by = 0;
  words >> buffer.name >> dtype >> elements >> misaligned_by >> buffer.read >> buffer.written;
  buffer.size =
      elements * (dtype == "int64" ? 8 : static_cast<std::size_t>(size_of(parse_dtype(dtype))));
  buffer.allocate(misaligned_by);
  fcrn::LossPass& pass = description.pass;
  const std::string& name = buffer.name;
  if (fcrn::TensorView* view = find_view(pass, name)) {
    view->data = buffer.data;
    view->dtype = parse_dtype(dtype);
  } else if (name == "negative_weight") {
    pass.negative_weight = {buffer.data, parse_dtype(dtype), 0.0};
  } else if (name == "coord_weights") {
    pass.coord_weights.data = buffer.data;
    pass.coord_weights.dtype = parse_dtype(dtype);
    pass.coord_weights.stride = 1;
    pass.coord_weights.count = static_cast<std::int64_t>(elements);
  } else if (name == "known_positive") {
    pass.known_positive = reinterpret_cast<const std::int64_t*>(buffer.data);
  } else if (name == "known_divisor") {
    pass.known_divisor = reinterpret_cast<const double*>(buffer.data);
  } else if (name == "loss") {
    pass.loss = buffer.data;
  } else if (name == "coord") {
    pass.coord = buffer.data;
  } else if (name == "positive_conf") {
    pass.positive_conf = buffer.data;
  } else if (name == "negative_conf") {
    pass.negative_conf = buffer.data;
  } else if (name == "num_positive") {
    pass.num_positive = reinterpret_cast<std::int64_t*>(buffer.data);
  } else {
    refuse("buffer " + name);
  }
}

void parse_line(Description& description, const std::string& line) {
  fcrn::LossPass& pass = description.pass;
  std::istringstream words(line);
  std::string keyword, name;
  words >> keyword;
  if (keyword == "grid") {
    fcrn::Grid& grid = pass.grid;
    words >> grid.maps >> grid.images >> grid.cells;
    for (grid.spatial_dims = 0; words >> grid.sizes[grid.spatial_dims];) ++grid.spatial_dims;
    return;
  }
  if (keyword == "view") {
    words >> name;
    fcrn::TensorView* view = find_view(pass, name);
    if (view == nullptr) refuse("view " + name);
    words >> view->image_stride >> view->map_stride;
    for (int dim = 0; words >> view->cell_strides[dim];) ++dim;
    return;
  }
  if (keyword == "coord_weights") {
    fcrn::CoordWeights& weights = pass.coord_weights;
    weights.count = 0;
    for (std::string word; words >> word;) {
      if (weights.count == fcrn::kInlineCoordWeights) refuse("too many coord_weights");
      weights.numbers[weights.count++] = std::strtod(word.c_str(), nullptr);
    }
    return;
  }
  if (keyword == "rule") {
    int output = 0;
    words >> output >> pass.divisor >> pass.wrt_target >> pass.grad_is_for_one;
    pass.output = static_cast<fcrn::Output>(output);
    pass.positive_weight = parse_double(words);
    pass.ignore_value = parse_double(words);
  } else if (keyword == "kinds") {
    words >> pass.has_kinds;
  } else if (keyword == "weight_repeat") {
    words >> pass.weight_repeat;
  } else if (keyword == "machine") {
    words >> description.resident_blocks;
  } else if (keyword == "wide_index") {
    words >> description.wide_index;
  } else if (keyword == "negative_weight") {
    pass.negative_weight = {nullptr, fcrn::DType::float64, parse_double(words)};
  } else if (keyword == "buffer") {
    parse_buffer(description, words);
  } else if (keyword == "piece") {
    std::size_t begin = 0, size = 0;
    words >> name >> begin >> size;
    Buffer& buffer = description.buffer(name);
    description.pieces.emplace_back(&buffer, buffer.pieces.size());
    buffer.pieces.push_back({begin, std::vector<char>(size)});
  } else if (keyword == "never_read") {
    std::size_t begin = 0, end = 0;
    words >> name >> begin >> end;
    description.never_read.push_back({&description.buffer(name), begin, end});
  } else if (keyword == "schedule") {
    std::string order;
    cuda_on_host::Schedule schedule;
    words >> order >> schedule.seed >> schedule.resident_blocks;
    schedule.order = order == "forward"    ? cuda_on_host::Order::kForward
                     : order == "backward" ? cuda_on_host::Order::kBackward
                                           : cuda_on_host::Order::kShuffled;
    description.schedules.push_back(schedule);
  } else {
    refuse("line " + line);
  }
  if (words.fail()) refuse("line " + line);
}

// The confidences of target, as GridBuilder::add_last_map has them.
fcrn::TensorView last_map(const fcrn::TensorView& of, const fcrn::Grid& grid) {
  fcrn::TensorView view = of;
  const std::int64_t before = (grid.maps - 1) * of.map_stride * size_of(of.dtype);
  if (of) view.data = static_cast<std::byte*>(of.data) + before;
  view.map_stride = 0;
  return view;
}

}  // namespace

Description read_description(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Description description;
  for (std::string line; std::getline(file, line) && line != "data";) parse_line(description, line);
  fcrn::LossPass& pass = description.pass;
  if (pass.has_kinds) pass.kinds = last_map(pass.target, pass.grid);
  for (const auto& [buffer, index] : description.pieces) {
    std::vector<char>& bytes = buffer->pieces[index].bytes;
    file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  if (!file) refuse(std::string("cannot read all of ") + path);
  return description;
}

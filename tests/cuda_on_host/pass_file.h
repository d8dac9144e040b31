// A pass of the loss as a file describes it, and the memory that it works on.
#ifndef TESTS_CUDA_ON_HOST_PASS_FILE_H_
#define TESTS_CUDA_ON_HOST_PASS_FILE_H_

#include <cstddef>
#include <deque>
#include <iosfwd>
#include <string>
#include <utility>
#include <vector>

#include "grid.h"
#include "loss_pass.h"

// What memory holds that a kernel has not written: NaN in every floating type, -1 in every integer.
inline constexpr int kPoison = 0xFF;

// Ends the program for a description that it does not understand.
[[noreturn]] void refuse(const std::string& why);

// One allocation, exactly as long as it must be, so that AddressSanitizer sees the byte after it;
// what a misalignment leaves before it belongs to no one either. A large one is left to the
// system's pages of zeros: only its pieces are filled and written out.
struct Buffer {
  struct Piece {
    std::size_t begin;
    std::vector<char> bytes;
  };

  std::string name;
  std::size_t size = 0;
  bool read = false, written = false;
  std::byte* data = nullptr;
  std::vector<Piece> pieces;

  bool is_large() const;
  void allocate(std::size_t misaligned_by);
  // What a run finds: the given bytes, poison elsewhere.
  void fill();
  void write_to(std::ostream& results) const;
  // Lets no thread read a part.
  void forbid(std::size_t begin, std::size_t end);
};

struct Description {
  struct Forbidden {
    Buffer* buffer;
    std::size_t begin, end;
  };

  fcrn::LossPass pass;
  std::deque<Buffer> buffers;
  std::vector<std::pair<Buffer*, std::size_t>>
      pieces;  // in the order of the data; index in the buffer
  std::vector<Forbidden> never_read;
  std::vector<cuda_on_host::Schedule> schedules;
  int resident_blocks = 1;
  bool wide_index = false;

  Buffer& buffer(const std::string& name);
};

Description read_description(const char* path);

#endif  // TESTS_CUDA_ON_HOST_PASS_FILE_H_

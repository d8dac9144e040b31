// A tensor (B, C, *S) as the kernels see it: pointer, dtype and strides. Does not need PyTorch.
#pragma once

#include <cstdint>

#include "scalar_types.h"

namespace fcrn {

// The most dimensions of the grid, after contiguous ones have been merged.
constexpr int kMaxSpatialDims = 16;

// The cells of a batch. If one stride leads through the cells of all images, as in channels-last
// tensors, B is merged with S.
struct Grid {
  int64_t maps = 0;    // C, the last one the confidence
  int64_t images = 0;  // B, or 1 if B was merged with S
  int64_t cells = 0;   // of one image: the product of `sizes`
  int spatial_dims = 1;
  int64_t sizes[kMaxSpatialDims] = {};
};

struct TensorView {
  void* data = nullptr;  // nullptr: there is no such tensor
  DType dtype = DType::float32;
  int64_t image_stride = 0;  // strides in elements
  int64_t map_stride = 0;
  int64_t cell_strides[kMaxSpatialDims] = {};

  FCRN_HD explicit operator bool() const { return data != nullptr; }

  // The cells of a map are contiguous.
  FCRN_HD bool is_planar(const Grid& grid) const {
    return grid.spatial_dims == 1 && (cell_strides[0] == 1 || grid.cells == 1);
  }

  // Channels-last: the maps of a cell are contiguous, and so are the cells.
  FCRN_HD bool is_interleaved(const Grid& grid) const {
    return grid.images == 1 && grid.spatial_dims == 1 && (map_stride == 1 || grid.maps == 1) &&
           (cell_strides[0] == grid.maps || grid.cells == 1);
  }

  // The offset of map 0 of a cell, from the cell's number in its image.
  template <typename Index>
  FCRN_HD Index cell_offset(const Grid& grid, Index image, Index cell) const {
    Index offset = image * static_cast<Index>(image_stride);
    for (int i = grid.spatial_dims - 1; i > 0; --i) {
      const Index size = static_cast<Index>(grid.sizes[i]);
      offset += (cell % size) * static_cast<Index>(cell_strides[i]);
      cell /= size;
    }
    return offset + cell * static_cast<Index>(cell_strides[0]);
  }
};

}  // namespace fcrn

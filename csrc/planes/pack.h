// From the artifact's neutral tensors to the tiles of the boolean product.
#pragma once
#include "../pack.h"
#include "planes.h"

namespace bitwright {

int64_t plane_bytes(const Geometry&);

// Writes the rows of one linear into the packed weights of its site, from row `at` on. `packed` was zeroed before.
void pack_planes(const Neutral&, const Geometry&, int64_t at, uint8_t* packed, int threads);

}  // namespace bitwright

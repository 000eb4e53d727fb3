// From the artifact's neutral tensors to the tiles of the boolean product.
#pragma once
#include "pack.h"
#include "planes/planes.h"

namespace bitwright {

// Writes the tiles of one linear, as `pack` does. `packed` was zeroed before.
void pack_planes(const Neutral&, const Geometry&, uint8_t* packed, int threads);

}  // namespace bitwright

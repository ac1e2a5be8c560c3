// The streaming kernels, once for every instruction set: included by each tier_*.cpp inside a namespace of its own,
// after it has switched its instruction set on, with
//   FASTCONFIG_VECTOR_BYTES   the width of a vector of doubles
//   FASTCONFIG_TIER_NAME      as FASTCONFIG_ISA spells it
//   FASTCONFIG_PACKS          whether the Gramian of many rows is packed.hpp's
//   FASTCONFIG_X86            1 where <immintrin.h>'s F16C and streaming stores may be used
// Vectors are the compiler's generic ones (GCC, Clang), so the arithmetic is written once and the baseline needs no
// intrinsics. No standard header may be included here: its inline functions would be compiled for this tier, and the
// linker could keep that copy for all.

#include "elements.hpp"
// elements.hpp first: the others are written in its terms.
#include "combine.hpp"
#include "convert.hpp"
#include "dense.hpp"
#include "gramian.hpp"
// after gramian.hpp, of whose panels it makes its own
#include "packed.hpp"
// after combine.hpp, whose strips they go by
#include "philox.hpp"
// after philox.hpp, by which it draws
#include "graddrop.hpp"
// after them: it streams by combine.hpp's strips and multiplies by gramian.hpp's tiles.
#include "moments.hpp"

#undef INLINE

const Tier kTier = {FASTCONFIG_TIER_NAME,
                    {dense_dot, dense_dot_and_size, dense_add, dense_multiply, dense_place, dense_factor, dense_solve,
                     dense_tridiagonalise},
                    gramian_scratch_size,
                    {gramian<Float32>, gramian<Float64>, gramian<BFloat16>, gramian<Float16>},
                    {combine<Float32>, combine<Float64>, combine<BFloat16>, combine<Float16>},
                    {nullptr, nullptr, combine_single<BFloat16>, combine_single<Float16>},
                    {graddrop<Float32>, graddrop<Float64>, graddrop<BFloat16>, graddrop<Float16>},
                    momentum_scratch,
                    {{momentum_products<Float32, Float32>, nullptr, momentum_products<Float32, BFloat16>,
                      momentum_products<Float32, Float16>},
                     {momentum_products<Float64, Float32>, momentum_products<Float64, Float64>,
                      momentum_products<Float64, BFloat16>, momentum_products<Float64, Float16>}},
                    {{momentum_update<Float32, Float32>, nullptr, momentum_update<Float32, BFloat16>,
                      momentum_update<Float32, Float16>},
                     {momentum_update<Float64, Float32>, momentum_update<Float64, Float64>,
                      momentum_update<Float64, BFloat16>, momentum_update<Float64, Float16>}}};

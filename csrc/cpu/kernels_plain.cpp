// The kernels for the baseline instructions of the architecture (SSE2, NEON).
#include "kernels.h"

#define PARAMSTATS_LEVEL_NAME "plain"
namespace paramstats::cpu::plain {
constexpr int kVectorBytes = 16;
constexpr int kUnroll = 4;
constexpr int kUnroll16 = 4;
constexpr int kTileUnroll = 1;
#include "kernels_body.h"
}  // namespace paramstats::cpu::plain

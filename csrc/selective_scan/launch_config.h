// How the CUDA scan divides its work; read by kernels and host alike.
//
// `tile` is the fast way, for channel-last memory. A warp owns kWarpChannels neighbouring channels of one batch element
// (and one group of B and C) and kStates states, and walks through time in chunks of kSteps steps. The lanes l and
// l + 16 share two neighbouring channels, slots of the warp: each has one half of the states of both. More than
// kStates states are scanned by one launch per kStates of them. The warps of a block are neighbours and work on their
// own, but for the sums of dB and dC over all their channels.
//
// `spread_tile` is for few channels and batch elements, `general_tile` for what the others do not take.
#pragma once

#include <cstdint>

namespace mamba_ssm {
namespace tile {

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kStates = 16, kThreadStates = 8;
constexpr int kSlots = 2;  // channels of a thread
constexpr int kWarpChannels = 32;
constexpr int kChannels = kWarps * kWarpChannels;
constexpr int kSteps = 8;

// Blocks that a multiprocessor is to hold at one time; they bound the registers of a thread.
constexpr int kForwardBlocks = 3, kBackwardBlocks = 3;

// Where batch and channels make few blocks, the sequence is split into segments, each a block's (forward only if
// spread_tile would take longer): a first launch finds
// what each segment makes of a state (its decay, and what it adds), a short scan over the segments the states between
// them, and then all segments run at one time. That does the scan's work nearly twice, so it must be worth it.
constexpr int kLeastSegments = 4, kLeastSegmentChunks = 4;

// How many segments `chunks` chunks are split into, if an undivided scan has `blocks` blocks: so many that two or three
// blocks for each multiprocessor leave the fewest places empty. Two already keep it as busy as three.
constexpr int segment_count(std::int64_t blocks, std::int64_t chunks, std::int64_t multiprocessors) {
  const std::int64_t two = 2 * multiprocessors / blocks, three = 3 * multiprocessors / blocks;
  const std::int64_t fitting = 3 * two * blocks >= 2 * three * blocks ? two : three;
  const std::int64_t longest = chunks / kLeastSegmentChunks, segments = fitting < longest ? fitting : longest;
  return segments < kLeastSegments ? 1 : static_cast<int>(segments);
}

}  // namespace tile

// `spread_tile` is for few channels and batch elements, forward: the states of a channel are spread over 4 or 8
// lanes of a warp, so that there are more warps, which walk through an undivided sequence. A block has the channels
// that its threads make.
namespace spread_tile {

constexpr int kLanes[] = {4, 8};
constexpr int kWarps = 16;  // of a multiprocessor, at least; they bound the registers of a thread
constexpr int threads(int lanes) { return lanes == 4 ? 64 : 128; }
constexpr std::int64_t tiles(std::int64_t channels, int lanes) {
  const int width = threads(lanes) / lanes;
  return (channels + width - 1) / width;
}

}  // namespace spread_tile

// How many lanes a channel has in the forward scan's spread_tile, or 0 for `tile`: what takes least time for so many
// batch elements times groups and channels of each, by cycles of one multiprocessor of an H200 under zoh. Of a step:
// `alone`, and `beside` for each block of the multiprocessor, as long as they hide each other's latencies; `full` for
// each block where there are many. A warp of `tile` takes a quarter of its block's. Both passes over segments take 6.2
// for 32 channels' states at a step, and their beginnings and ends 25,000.
constexpr int forward_lanes(std::int64_t rows, std::int64_t channels, std::int64_t length,
                            std::int64_t multiprocessors) {
  const auto steps = [=](std::int64_t blocks, std::int64_t alone, std::int64_t beside, std::int64_t full) {
    const std::int64_t each = (blocks + multiprocessors - 1) / multiprocessors;
    const std::int64_t few = alone + beside * each, many = full * each;
    return length * (few > many ? few : many);
  };
  const std::int64_t tiles = (channels + tile::kChannels - 1) / tile::kChannels, blocks = rows * tiles;
  const std::int64_t warps = (channels + tile::kWarpChannels - 1) / tile::kWarpChannels;
  const bool whole = tile::segment_count(blocks, (length + tile::kSteps - 1) / tile::kSteps, multiprocessors) == 1;
  std::int64_t least = whole ? steps(blocks, 300, 0, 225 * warps / (tile::kWarps * tiles))
                             : 25000 + rows * channels * tile::kStates / 32 * length * 62 / 10 / multiprocessors;
  int best = 0;
  for (int lanes : spread_tile::kLanes) {
    const std::int64_t spread = rows * spread_tile::tiles(channels, lanes);
    const std::int64_t cycles = lanes == 4 ? steps(spread, 118, 16, 34) : steps(spread, 62, 16, 43);
    if (spread < 1ll << 31 && cycles < least) least = cycles, best = lanes;
  }
  return best;
}

namespace general_tile {

// A block owns kChannels neighbouring channels and kStates states. Two threads share a channel: lanes 0 to 15 of a warp
// have the first half of the states of 16 channels, lanes 16 to 31 the second.
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kStates = tile::kStates, kThreadStates = 8;
constexpr int kChannels = kThreads * kThreadStates / kStates;
constexpr int kWarpChannels = kChannels / kWarps;
constexpr int kSteps = tile::kSteps;

}  // namespace general_tile
}  // namespace mamba_ssm

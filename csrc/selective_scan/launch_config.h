// How the CUDA scan divides its work; read by kernels and host alike.
//
// A block of threads owns a tile: kChannels neighbouring channels of one batch element (and one group of B and C), and
// kStates states. It walks through time in chunks of kSteps steps, staged in shared memory. Two threads share a
// channel, each with kThreadStates states in registers: lanes 0 to 15 of a warp have the first half of the states of
// 16 channels, lanes 16 to 31 the second. More than kStates states are scanned by one launch per kStates of them.
#pragma once

#include <cstdint>

namespace mamba_ssm {
namespace tile {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kStates = 16, kThreadStates = 8;
constexpr int kChannels = kThreads * kThreadStates / kStates;
constexpr int kWarpChannels = kChannels / kWarps;
constexpr int kSteps = 16;  // and the distance between the checkpoints of the state
constexpr int kPart = 4;    // steps that the backward pass keeps in registers at one time

// Blocks that a multiprocessor is to hold at one time; they bound the registers of a thread.
constexpr int kForwardBlocks = 6, kBackwardBlocks = 3;

// Where batch and channels make few blocks, the sequence is split into segments, each a block's: a first launch finds
// what each segment makes of a state (its decay, and what it adds), a short scan over the segments the states between
// them, and then all segments run at one time. That does the scan's work nearly twice, so it must be worth it.
constexpr int kLeastSegments = 3, kLeastSegmentChunks = 4;

// How many segments `chunks` chunks are split into, if an undivided scan has `blocks` blocks and the device room for
// `slots` of them.
constexpr int segment_count(std::int64_t blocks, int chunks, std::int64_t slots) {
  const std::int64_t fitting = slots / blocks, longest = chunks / kLeastSegmentChunks;
  const std::int64_t segments = fitting < longest ? fitting : longest;
  return segments < kLeastSegments ? 1 : static_cast<int>(segments);
}

}  // namespace tile
}  // namespace mamba_ssm

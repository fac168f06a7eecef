// What Python and C++ share: plain structs, mirrored by ctypes in headway/ops/cpu/abi.py. All sizes in elements unless
// said otherwise; every pointer is owned by Python and outlives the call.
#pragma once
#include <cstdint>

namespace headway {

enum DType : int32_t { F32 = 0, BF16 = 1, INT8 = 2, F16 = 3 };
enum Quant : int32_t { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8 };  // GGUF's numbers
enum Act : int32_t { ACT_NONE = 0, ACT_SILU = 1, ACT_GELU = 2, ACT_GELU_TANH = 3, ACT_RELU = 4 };

// A packed weight. Columns (output features) come in panels of 32; a panel is [groups of k][32] 32-bit words, a word
// holding 1 float, 2 bfloat16 (k, k + 1) or 4 int8 (k .. k + 3) of one column: the layout of the dot-product
// instructions. Gated weights put 16 columns of gate beside the 16 of up that they multiply.
struct Linear {
  const void* words;
  const float* bias;      // [panels * 32], or null
  const float* scale;     // int8: [panels * 32] one per column
  const int32_t* offset;  // int8: [panels * 32] -128 * the sum over k of the quantised column
  int64_t n, k;          // as the model sees them
  int64_t panels, groups;
  int32_t dtype, gated;
};

// Keys and values of one layer: [block][kv head][K | V], K: [d / P][S] words, V: [s / P][D] words, where a word is P
// elements (P = 2 for bfloat16, 1 for float): one dot instruction scores 16 keys, or adds 16 dimensions of value.
struct KvLayout {
  void* base;
  int64_t layer_stride;  // bytes
  int64_t num_blocks, block_size, kv_heads, head_dim;
  int32_t dtype;
};

// The step's tokens: run r has tokens start[r] .. start[r+1]-1, the last of which sits at position context[r] - 1.
struct Runs {
  int64_t count, tokens;
  const int32_t* start;         // [count + 1]
  const int32_t* context;       // [count]
  const int32_t* table;         // block table, one row a run through row[]
  const int32_t* table_row;     // [count], or null: run r has row r
  int64_t table_stride;
};

enum OpCode : int32_t {
  OP_EMBED = 0, OP_NORM = 1, OP_LINEAR = 2, OP_ROTARY_KV = 3, OP_ATTENTION = 4, OP_HEAD = 5, OP_GATHER = 6,
  OP_ALL_REDUCE = 7,  // X = or += (mode: LIN_SET, LIN_ADD) the sum of the ranks' PARTs
  OP_MEET = 8         // what ranks wrote into ALL_QKV is there
};
// X and SAMPLED_X are float32, the others in the compute dtype. After a gather, the rows that want a token go on alone in
// the SAMPLED buffers. PART is float32: what this rank adds to the residual stream, in memory that the ranks share.
// Ranks with half a key/value head each have equal parts of the projections: MY_QKV are this rank's columns of ALL_QKV,
// which they share; QKV are the heads that it attends to; MY_ATTN its columns of ATTN.
enum Buffer : int32_t {
  BUF_X = 0, BUF_H = 1, BUF_QKV = 2, BUF_ATTN = 3, BUF_ACT = 4, BUF_SAMPLED_X = 5, BUF_SAMPLED_ATTN = 6, BUF_PART = 7,
  BUF_ALL_QKV = 8, BUF_MY_QKV = 9, BUF_MY_ATTN = 10, BUF_COUNT = 11
};
enum LinearMode : int32_t { LIN_STORE = 0, LIN_ADD = 1, LIN_GATED = 2, LIN_SET = 3 };  // ADD and SET write float32 X
enum NormKind : int32_t { NORM_NONE = 0, NORM_RMS = 1, NORM_LAYER = 2 };
enum OpFlags : int32_t { SAMPLED = 1, NORM_KEEP = 2 };  // KEEP: also write the result back to the source (post-norm)

struct Op {
  int32_t code, src, dst, mode;  // mode: LinearMode or NormKind
  int32_t act, flags, layer, pad;
  const Linear* linear;    // LINEAR, HEAD; EMBED from a tied head
  const void* table;       // EMBED: [vocab, k] in the compute dtype; with linear null too, only positions are added
  const void* positions;   // EMBED: learned positions [., k] float32, or null
  const float* weight;     // NORM; ROTARY_KV: q_norm
  const float* bias;       // NORM; ROTARY_KV: k_norm
  int64_t width;           // NORM, EMBED: elements in a row
  int64_t position_offset;
  // EMBED: the tokens that this rank has rows of; those of others are zeros.
  // ROTARY_KV from ALL_QKV: this rank's first key/value head, and how many there are.
  int64_t first, count;
  float eps, pad2;
};

// The persistent batch (headway/worker/batch.py), indexed by slot.
struct Batch {
  int32_t* tokens;
  int64_t token_stride;
  int32_t* computed;
  int32_t* length;
  const int32_t* prompt_len;
  const int32_t* block_table;
  int64_t table_stride;
  const float *temperature, *top_p, *min_p;
  const int32_t* top_k;
  const uint64_t* seed;
};

// The tensor parallel ranks of a stage, in memory that they share (csrc/collective.h).
struct Group {
  char* memory;
  int64_t first_part, part_bytes;
  const int32_t* pidfd;  // [size] of their processes, or -1
  int32_t rank, size;
  uint32_t exchanges;    // done so far
  int32_t lost;          // a rank that has ended, or -1: nothing more can be computed
};

struct Program {
  const Op* ops;
  int64_t num_ops;
  KvLayout kv;
  int64_t num_heads, rotary_dim;
  const float* cos_sin;  // [positions, rotary_dim]: cos, then sin
  float attention_scale;
  int32_t window;        // 0: no window
  int32_t dtype, threads;
  void* buffers[BUF_COUNT];
  int64_t strides[BUF_COUNT];  // elements a row
  float* logits;               // [max rows, vocab stride], whole rows
  int64_t logits_stride, vocab;
  int64_t max_tokens, max_rows;
  int32_t* scratch;            // int32 [scratch_size(max_tokens, max_runs)]
  int64_t max_runs;
  Group* group;        // null: one rank
  const int64_t* vocab_start;  // [ranks + 1] each rank's first column of the head; null: one rank
};

// One step. rows: indices into runs that produce logits; want[i]: 0 argmax, 1 sample, 2 float32 logits in
// logits row i. token[i]: the chosen id (untouched for want 2). advance: the batch
// takes in what was computed and chosen, which is all there is to do when no row wants logits.
struct Step {
  int64_t runs;
  const int32_t* run_slots;
  const int32_t* run_tokens;
  int64_t rows;
  const int32_t* row_runs;
  const int32_t* want;
  int32_t* token;
  int64_t advance;
};

}  // namespace headway

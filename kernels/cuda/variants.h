// Entry points of the CUDA ops; select.cu makes the table of kernels/kernels.h from them.
#pragma once

#include "kernels/kernels.h"

namespace ternion::kernels::cuda {

// rows.cu
void RmsNorm(const RmsNormArgs& args, Executor& executor);
void Quantize(const QuantizeArgs& args, Executor& executor);
void Embed(const EmbedArgs& args, Executor& executor);
void Rope(const RopeArgs& args, Executor& executor);
void Hadamard(const HadamardArgs& args, Executor& executor);
void GatherRows(const GatherRowsArgs& args, Executor& executor);
void WeightedSum(const WeightedSumArgs& args, Executor& executor);
void Zero(const ZeroArgs& args, Executor& executor);

// codec.cu
void EncodeRows(const EncodeRowsArgs& args, Executor& executor);
void DecodeRows(const DecodeRowsArgs& args, Executor& executor);
void AddRows(const AddRowsArgs& args, Executor& executor);
void PackCodes(const PackCodesArgs& args, Executor& executor);
void UnpackInt4(const UnpackInt4Args& args, Executor& executor);

// attention.cu
void KvStore(const KvStoreArgs& args, Executor& executor);
void Attention(const AttentionArgs& args, Executor& executor);

// dense.cu
void DenseMatmul(const DenseMatmulArgs& args, Executor& executor);
void GateTopK(const GateTopKArgs& args, Executor& executor);

// sample.cu
void Sample(const SampleArgs& args, Executor& executor);

// draw.cu
void DrawTernary(const DrawTernaryArgs& args, Executor& executor);

// ternary.cu
void TernaryMatmul(const TernaryMatmulArgs& args, Executor& executor);
void ExpertMatmul(const ExpertMatmulArgs& args, Executor& executor);

// routes.cu
void GroupRoutes(const GroupRoutesArgs& args, Executor& executor);
void SumRoutes(const SumRoutesArgs& args, Executor& executor);

}  // namespace ternion::kernels::cuda

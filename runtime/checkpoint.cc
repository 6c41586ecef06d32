#include "runtime/checkpoint.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <vector>

#include "absl/strings/str_join.h"
#include "base/status.h"

namespace ternion::runtime {
namespace {

bool IsFloat(DType dtype) {
  return dtype == DType::kBf16 || dtype == DType::kF16 || dtype == DType::kF32;
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const int exponent = (half >> 10) & 31;
  const uint32_t mantissa = half & 0x3ffu;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa | 0x400u), exponent - 25);
  }
  return sign != 0 ? -magnitude : magnitude;
}

// Elements [begin, begin + count) of a float tensor as fp32.
void ReadFloats(const TensorView& tensor, int64_t begin, int64_t count, float* out) {
  const int64_t bytes = DTypeBytes(tensor.dtype);
  const uint8_t* data = tensor.data.data() + begin * bytes;
  if (tensor.dtype == DType::kF32) {
    std::memcpy(out, data, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, data + 2 * i, 2);
    if (tensor.dtype == DType::kF16) {
      out[i] = HalfToFloat(bits);
    } else {
      const uint32_t wide = uint32_t{bits} << 16;
      std::memcpy(&out[i], &wide, 4);
    }
  }
}

absl::Status CheckTensor(const std::string& name, const TensorView& tensor,
                         const std::vector<int64_t>& shape, bool float_type) {
  if (tensor.shape != shape) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " has shape [", absl::StrJoin(tensor.shape, ", "), "], expected [",
                     absl::StrJoin(shape, ", "), "]"));
  }
  if (float_type ? !IsFloat(tensor.dtype) : tensor.dtype != DType::kU8) {
    const std::string dtype(DTypeName(tensor.dtype));
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is ", dtype, ", expected ",
                     float_type ? "BF16, F16 or F32" : "U8 (packed ternary)"));
  }
  return absl::OkStatus();
}

// Ternarizes float master weights [rows, columns] by their mean magnitude, row by row.
absl::StatusOr<kernels::OwnedTernaryMatrix> Ternarize(const std::string& name,
                                                      const TensorView& tensor,
                                                      kernels::TernaryLayout layout) {
  const int64_t rows = tensor.shape[0], columns = tensor.shape[1];
  std::vector<float> row(columns);
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    ReadFloats(tensor, r * columns, columns, row.data());
    for (float w : row) sum += std::abs(w);
  }
  const float mean = static_cast<float>(sum / (static_cast<double>(rows) * columns));
  if (!std::isfinite(mean)) {
    return absl::InvalidArgumentError(absl::StrCat(name, " holds a NaN or infinite weight"));
  }
  const float g = std::max(mean, 1e-5f);
  kernels::OwnedTernaryMatrix matrix = kernels::MakeTernaryMatrix(rows, columns, g, layout);
  std::vector<int8_t> panel(kernels::kPanelRows * columns);
  for (int64_t begin = 0; begin < rows; begin += kernels::kPanelRows) {
    const int64_t count = std::min<int64_t>(kernels::kPanelRows, rows - begin);
    for (int64_t r = 0; r < count; ++r) {
      ReadFloats(tensor, (begin + r) * columns, columns, row.data());
      for (int64_t c = 0; c < columns; ++c) {
        const float q = std::nearbyint(row[c] / g);
        panel[r * columns + c] = static_cast<int8_t>(q > 0 ? 1 : q < 0 ? -1 : 0);
      }
    }
    kernels::PackTernary(panel.data(), begin, begin + count, matrix);
  }
  return matrix;
}

}  // namespace

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  if (!std::filesystem::is_directory(directory)) {
    return absl::NotFoundError(absl::StrCat("no model directory at ", directory));
  }
  Checkpoint checkpoint;
  TERNION_ASSIGN_OR_RETURN(checkpoint.config_, LoadModelConfig(directory));
  if (!checkpoint.config_.random_seed) {
    TERNION_ASSIGN_OR_RETURN(checkpoint.tensors_, TensorStore::Open(directory));
    return checkpoint;
  }
  std::map<std::string, TensorView, std::less<>> shapes;
  for (RandomTensor& tensor : RandomTensors(checkpoint.config_)) {
    shapes[tensor.entry.name] = {tensor.entry.dtype, tensor.entry.shape, {}};
    checkpoint.random_[tensor.entry.name] = std::move(tensor);
  }
  checkpoint.tensors_ = TensorStore::WithoutData(std::move(shapes));
  return checkpoint;
}

absl::StatusOr<Checkpoint::Tensor> Checkpoint::Read(const std::string& name) const {
  Tensor tensor;
  TERNION_ASSIGN_OR_RETURN(tensor.view, tensors_.Get(name));
  if (!config_.random_seed) return tensor;
  tensor.drawn.resize(tensor.view.bytes());
  random_.at(name).Draw(*config_.random_seed, 0, tensor.drawn);
  tensor.view.data = tensor.drawn;
  return tensor;
}

absl::StatusOr<float> Checkpoint::LoadScale(const std::string& name) const {
  TERNION_ASSIGN_OR_RETURN(const Tensor read, Read(name));
  const TensorView& tensor = read.view;
  if (!IsFloat(tensor.dtype) || tensor.num_elements() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is not one floating-point number"));
  }
  float scale;
  ReadFloats(tensor, 0, 1, &scale);
  if (!(scale > 0 && std::isfinite(scale))) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is ", scale, "; a weight scale must be finite and above 0"));
  }
  const float g = config_.quantization.scale_divides ? 1.0f / scale : scale;
  if (!std::isfinite(g)) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is ", scale, ", too small to divide by"));
  }
  return g;
}

absl::Status Checkpoint::CheckTernary(const std::string& name, int64_t rows,
                                      int64_t columns) const {
  const std::string weight = name + ".weight";
  TERNION_ASSIGN_OR_RETURN(const TensorView tensor, tensors_.Get(weight));
  const bool online = config_.quantization.online;
  const int64_t packed_rows = online ? rows : base::CeilDiv(rows, 4);
  TERNION_RETURN_IF_ERROR(CheckTensor(weight, tensor, {packed_rows, columns}, online));
  return online ? absl::OkStatus() : tensors_.Get(name + ".weight_scale").status();
}

absl::StatusOr<kernels::OwnedTernaryMatrix> Checkpoint::LoadTernary(
    const std::string& name, int64_t rows, int64_t columns, kernels::TernaryLayout layout) const {
  TERNION_RETURN_IF_ERROR(CheckTernary(name, rows, columns));
  const std::string weight = name + ".weight";
  TERNION_ASSIGN_OR_RETURN(const Tensor read, Read(weight));
  const TensorView& tensor = read.view;
  if (config_.quantization.online) return Ternarize(weight, tensor, layout);
  TERNION_ASSIGN_OR_RETURN(const float scale, LoadScale(name + ".weight_scale"));
  kernels::OwnedTernaryMatrix matrix = kernels::MakeTernaryMatrix(rows, columns, scale, layout);
  if (!kernels::RepackHf(tensor.data.data(), 0, rows, matrix)) {
    return absl::InvalidArgumentError(
        absl::StrCat(weight, " holds the code 3, which is no ternary weight"));
  }
  return matrix;
}

absl::StatusOr<kernels::OwnedTernaryMatrix> Checkpoint::DrawTernary(
    const std::string& name, int64_t rows, int64_t columns, kernels::TernaryLayout layout,
    const kernels::Kernels& kernels, kernels::Executor& executor) const {
  TERNION_RETURN_IF_ERROR(CheckTernary(name, rows, columns));
  TERNION_ASSIGN_OR_RETURN(const float scale, LoadScale(name + ".weight_scale"));
  kernels::OwnedTernaryMatrix matrix;
  matrix.codes =
      base::Buffer::Unset(kernels::TernaryBytes(rows, columns, layout), *executor.memory);
  matrix.view = {matrix.codes.data(), scale, rows, columns, layout};
  kernels.draw_ternary({.seed = *config_.random_seed,
                        .first_draw = random_.at(name + ".weight").first_draw,
                        .rows = rows,
                        .columns = columns,
                        .layout = layout,
                        .codes = matrix.codes.data()},
                       executor);
  return matrix;
}

absl::StatusOr<OwnedDenseMatrix> Checkpoint::LoadDense(const std::string& name, int64_t rows,
                                                       int64_t columns) const {
  TERNION_ASSIGN_OR_RETURN(const Tensor read, Read(name));
  const TensorView& tensor = read.view;
  TERNION_RETURN_IF_ERROR(CheckTensor(name, tensor, {rows, columns}, /*float_type=*/true));
  OwnedDenseMatrix matrix;
  const int64_t count = rows * columns;
  if (tensor.dtype == DType::kF16) {
    matrix.memory = base::Buffer(count * sizeof(float));
    ReadFloats(tensor, 0, count, reinterpret_cast<float*>(matrix.memory.data()));
  } else {
    matrix.memory = base::Buffer(tensor.data.size());
    std::memcpy(matrix.memory.data(), tensor.data.data(), tensor.data.size());
  }
  matrix.view = {
      matrix.memory.data(),
      tensor.dtype == DType::kBf16 ? kernels::DenseType::kBf16 : kernels::DenseType::kFp32, rows,
      columns};
  return matrix;
}

absl::StatusOr<base::Array<float>> Checkpoint::LoadVector(const std::string& name,
                                                          int64_t size) const {
  TERNION_ASSIGN_OR_RETURN(const Tensor read, Read(name));
  const TensorView& tensor = read.view;
  TERNION_RETURN_IF_ERROR(CheckTensor(name, tensor, {size}, /*float_type=*/true));
  base::Array<float> vector(size);
  ReadFloats(tensor, 0, size, vector.data());
  for (float value : vector.span()) {
    if (!std::isfinite(value)) {
      return absl::InvalidArgumentError(absl::StrCat(name, " holds a NaN or infinite value"));
    }
  }
  return vector;
}

}  // namespace ternion::runtime

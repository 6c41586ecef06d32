#include "runtime/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/status.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/testing/status.h"
#include "tests/testing/temp_dir.h"

namespace ternion::runtime {
namespace {

using test::IsError;
using test::IsInvalid;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Tensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};

template <typename T>
std::vector<uint8_t> BytesOf(const std::vector<T>& values) {
  std::vector<uint8_t> bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

Tensor Floats(const std::string& name, std::vector<int64_t> shape,
              const std::vector<float>& values) {
  return {name, DType::kF32, std::move(shape), BytesOf(values)};
}

Tensor Words(const std::string& name, DType dtype, std::vector<int64_t> shape,
             const std::vector<uint16_t>& values) {
  return {name, dtype, std::move(shape), BytesOf(values)};
}

// int8 weights [rows, columns] as Hugging Face packs them.
Tensor Packed(const std::string& name, int64_t rows, int64_t columns,
              const std::vector<int8_t>& weights) {
  const int64_t packed_rows = (rows + 3) / 4;
  Tensor tensor{name, DType::kU8, {packed_rows, columns}, {}};
  tensor.bytes.resize(packed_rows * columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < columns; ++c) {
      tensor.bytes[row % packed_rows * columns + c] |=
          static_cast<uint8_t>(weights[row * columns + c] + 1) << (2 * (row / packed_rows));
    }
  }
  return tensor;
}

// A directory with a config and these tensors.
class CheckpointTest : public ::testing::Test {
 protected:
  Checkpoint Open(const std::vector<Tensor>& tensors,
                  const std::string& linear_class = "autobitlinear",
                  const std::string& mode = "offline") {
    nlohmann::json config = {
        {"model_type", "bitnet"},       {"vocab_size", 16},         {"hidden_size", 8},
        {"num_hidden_layers", 1},       {"num_attention_heads", 2}, {"intermediate_size", 8},
        {"max_position_embeddings", 32}};
    config["quantization_config"] = {
        {"quant_method", "bitnet"}, {"linear_class", linear_class}, {"quantization_mode", mode}};
    directory_.Write("config.json", config.dump());
    const absl::Status written = WriteTensors(tensors);
    EXPECT_TRUE(written.ok()) << written;
    auto checkpoint = Checkpoint::Open(directory_.path());
    TERNION_CHECK(checkpoint.ok());
    return *std::move(checkpoint);
  }

  absl::Status WriteTensors(const std::vector<Tensor>& tensors) {
    std::vector<SafetensorsWriter::Entry> entries;
    for (const Tensor& t : tensors) entries.push_back({t.name, t.dtype, t.shape});
    TERNION_ASSIGN_OR_RETURN(
        SafetensorsWriter writer,
        SafetensorsWriter::Create(directory_.path() + "/model.safetensors", entries));
    for (const Tensor& t : tensors) TERNION_RETURN_IF_ERROR(writer.Append(t.bytes));
    return writer.Finish();
  }

  test::TempDir directory_;
};

std::vector<int8_t> Unpack(const kernels::OwnedTernaryMatrix& matrix) {
  std::vector<int8_t> weights(matrix.view.rows * matrix.view.columns);
  kernels::UnpackTernary(matrix.view, weights.data());
  return weights;
}

std::vector<int8_t> RandomWeights(int64_t count, std::mt19937& random) {
  std::vector<int8_t> weights(count);
  for (int8_t& weight : weights) weight = static_cast<int8_t>(random() % 3) - 1;
  return weights;
}

TEST_F(CheckpointTest, PackedMatricesOfAnyShape) {
  std::mt19937 random(1);
  for (const int64_t rows : {1, 2, 3, 4, 5, 16, 17, 63, 66}) {
    for (const int64_t columns : {1, 15, 16, 33}) {
      SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(columns));
      const std::vector<int8_t> weights = RandomWeights(rows * columns, random);
      const Checkpoint checkpoint = Open(
          {Floats("a.weight_scale", {1}, {0.25f}), Packed("a.weight", rows, columns, weights)});
      EXPECT_TRUE(checkpoint.CheckTernary("a", rows, columns).ok());
      const auto matrix = checkpoint.LoadTernary("a", rows, columns);
      ASSERT_TRUE(matrix.ok()) << matrix.status();
      EXPECT_EQ(matrix->view.rows, rows);
      EXPECT_EQ(matrix->view.columns, columns);
      EXPECT_EQ(Unpack(*matrix), weights);
    }
  }
}

TEST_F(CheckpointTest, ScaleMultipliesOrDivides) {
  const std::vector<int8_t> weights = {1, 0, -1, 1};
  const uint16_t four_bf16 = 0x4080;
  const std::vector<Tensor> scales = {Floats("a.weight_scale", {1}, {4.0f}),
                                      Floats("a.weight_scale", {}, {4.0f}),
                                      Words("a.weight_scale", DType::kBf16, {1}, {four_bf16}),
                                      Words("a.weight_scale", DType::kF16, {1, 1}, {0x4400})};
  for (const Tensor& scale : scales) {
    const std::vector<Tensor> tensors = {scale, Packed("a.weight", 4, 1, weights)};
    EXPECT_EQ(Open(tensors, "autobitlinear").LoadTernary("a", 4, 1)->view.scale, 4.0f);
    EXPECT_EQ(Open(tensors, "bitlinear").LoadTernary("a", 4, 1)->view.scale, 0.25f);
  }
}

TEST_F(CheckpointTest, BadScales) {
  const Tensor packed = Packed("a.weight", 4, 1, {1, 0, -1, 1});
  for (const char* linear_class : {"autobitlinear", "bitlinear"}) {
    for (const float scale : {0.0f, -0.0f, -1.0f, kNan, kInf, -kInf}) {
      const Checkpoint checkpoint =
          Open({Floats("a.weight_scale", {1}, {scale}), packed}, linear_class);
      EXPECT_TRUE(IsInvalid(checkpoint.LoadTernary("a", 4, 1).status(), "a.weight_scale is"))
          << scale;
    }
    const Checkpoint two = Open({Floats("a.weight_scale", {2}, {1, 1}), packed}, linear_class);
    EXPECT_TRUE(IsInvalid(two.LoadTernary("a", 4, 1).status(), "a.weight_scale is not one"));
    const Checkpoint none = Open({packed}, linear_class);
    EXPECT_TRUE(IsError(none.LoadTernary("a", 4, 1).status(), absl::StatusCode::kNotFound,
                        "a.weight_scale"));
    EXPECT_TRUE(
        IsError(none.CheckTernary("a", 4, 1), absl::StatusCode::kNotFound, "a.weight_scale"));
    const Checkpoint bytes = Open({{"a.weight_scale", DType::kU8, {1}, {1}}, packed}, linear_class);
    EXPECT_TRUE(IsInvalid(bytes.LoadTernary("a", 4, 1).status(), "a.weight_scale is not one"));
  }
  // Its inverse is no float.
  const Checkpoint tiny = Open({Floats("a.weight_scale", {1}, {1e-40f}), packed}, "bitlinear");
  EXPECT_TRUE(IsInvalid(tiny.LoadTernary("a", 4, 1).status(), "a.weight_scale is"));
}

TEST_F(CheckpointTest, CodeThreeIsNoWeight) {
  std::mt19937 random(2);
  for (const int64_t rows : {4, 6, 16, 30}) {
    Tensor packed = Packed("a.weight", rows, 20, RandomWeights(rows * 20, random));
    const Tensor scale = Floats("a.weight_scale", {1}, {1});
    ASSERT_TRUE(Open({scale, packed}).LoadTernary("a", rows, 20).ok());
    packed.bytes[random() % packed.bytes.size()] |= 3;  // field 0 is always a row
    EXPECT_TRUE(IsInvalid(Open({scale, packed}).LoadTernary("a", rows, 20).status(),
                          "a.weight holds the code 3"));
  }
}

TEST_F(CheckpointTest, MissingOrOfAnotherShapeOrType) {
  const Checkpoint checkpoint =
      Open({Floats("a.weight_scale", {1}, {1}), Floats("f.weight", {8, 3}, std::vector<float>(24)),
            Packed("a.weight", 8, 3, std::vector<int8_t>(24))});
  EXPECT_TRUE(checkpoint.LoadTernary("a", 8, 3).ok());
  for (const auto& [rows, columns] :
       std::vector<std::pair<int64_t, int64_t>>{{9, 3}, {4, 3}, {8, 4}, {3, 8}, {8, 1}}) {
    EXPECT_TRUE(IsInvalid(checkpoint.LoadTernary("a", rows, columns).status(),
                          "a.weight has shape [2, 3], expected ["));
    EXPECT_TRUE(
        IsInvalid(checkpoint.CheckTernary("a", rows, columns), "a.weight has shape [2, 3]"));
  }
  constexpr auto kNotFound = absl::StatusCode::kNotFound;
  EXPECT_TRUE(IsError(checkpoint.LoadTernary("b", 8, 3).status(), kNotFound, "b.weight"));
  EXPECT_TRUE(IsError(checkpoint.LoadDense("b.weight", 8, 3).status(), kNotFound, "b.weight"));
  EXPECT_TRUE(IsError(checkpoint.LoadVector("b.weight", 8).status(), kNotFound, "b.weight"));
  EXPECT_TRUE(
      IsInvalid(checkpoint.LoadTernary("f", 32, 3).status(), "f.weight is F32, expected U8"));
  EXPECT_TRUE(
      IsInvalid(checkpoint.LoadDense("a.weight", 2, 3).status(), "a.weight is U8, expected"));
  EXPECT_TRUE(
      IsInvalid(checkpoint.LoadDense("f.weight", 3, 8).status(), "f.weight has shape [8, 3]"));
  EXPECT_TRUE(
      IsInvalid(checkpoint.LoadVector("f.weight", 24).status(), "f.weight has shape [8, 3]"));
}

// NUMERICS.md: g = max(mean |W|, 1e-5), W_q = clamp(round(W / g), -1, 1).
TEST_F(CheckpointTest, OnlineTernarizationIsTheFormula) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 0.02f);
  for (const int64_t rows : {1, 5, 16, 35}) {
    for (const int64_t columns : {1, 7, 48}) {
      SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(columns));
      std::vector<float> master(rows * columns);
      for (float& w : master) w = normal(random);
      double sum = 0;
      for (float w : master) sum += std::abs(static_cast<double>(w));
      const float g = std::max(static_cast<float>(sum / master.size()), 1e-5f);
      std::vector<int8_t> expected;
      for (float w : master) {
        expected.push_back(static_cast<int8_t>(std::clamp(std::nearbyint(w / g), -1.0f, 1.0f)));
      }
      const auto matrix =
          Open({Floats("a.weight", {rows, columns}, master)}, "autobitlinear", "online")
              .LoadTernary("a", rows, columns);
      ASSERT_TRUE(matrix.ok()) << matrix.status();
      EXPECT_EQ(matrix->view.scale, g);
      EXPECT_EQ(Unpack(*matrix), expected);
    }
  }
}

TEST_F(CheckpointTest, OnlineTiesAndSmallWeights) {
  const auto load = [&](const std::vector<float>& master) {
    return *Open({Floats("a.weight", {1, static_cast<int64_t>(master.size())}, master)},
                 "autobitlinear", "online")
                .LoadTernary("a", 1, master.size());
  };
  // The mean is 1; half of it rounds to even, which is 0.
  const kernels::OwnedTernaryMatrix ties = load({0.5f, -0.5f, 0.75f, -0.75f, 1.5f, 2.0f});
  EXPECT_EQ(ties.view.scale, 1.0f);
  EXPECT_EQ(Unpack(ties), std::vector<int8_t>({0, 0, 1, -1, 1, 1}));
  // All below the floor of 1e-5.
  const kernels::OwnedTernaryMatrix small = load({1e-7f, -1e-7f, 0, 0});
  EXPECT_EQ(small.view.scale, 1e-5f);
  EXPECT_EQ(Unpack(small), std::vector<int8_t>({0, 0, 0, 0}));
}

TEST_F(CheckpointTest, OnlineNeedsFiniteFloats) {
  for (const float bad : {kNan, kInf, -kInf}) {
    const Checkpoint checkpoint =
        Open({Floats("a.weight", {2, 2}, {1, bad, 0, 1})}, "autobitlinear", "online");
    EXPECT_TRUE(IsInvalid(checkpoint.LoadTernary("a", 2, 2).status(), "a.weight holds a NaN"));
  }
  const Checkpoint packed =
      Open({Packed("a.weight", 8, 2, std::vector<int8_t>(16))}, "autobitlinear", "online");
  EXPECT_TRUE(IsInvalid(packed.LoadTernary("a", 2, 2).status(), "a.weight is U8, expected BF16"));
}

// The same numbers in three types; all are exact in each of them.
TEST_F(CheckpointTest, FloatTypes) {
  const std::vector<float> values = {1, -2, 0.5f, 0, 6.103515625e-05f, 240};
  const std::vector<uint16_t> bf16 = {0x3f80, 0xc000, 0x3f00, 0, 0x3880, 0x4370};
  const std::vector<uint16_t> f16 = {0x3c00, 0xc000, 0x3800, 0, 0x0400, 0x5b80};
  const Checkpoint checkpoint =
      Open({Floats("f32", {6}, values), Floats("m32", {2, 3}, values),
            Words("bf16", DType::kBf16, {6}, bf16), Words("mb16", DType::kBf16, {2, 3}, bf16),
            Words("f16", DType::kF16, {6}, f16), Words("m16", DType::kF16, {2, 3}, f16)});
  for (const char* name : {"f32", "bf16", "f16"}) {
    const auto vector = checkpoint.LoadVector(name, 6);
    ASSERT_TRUE(vector.ok()) << vector.status();
    EXPECT_EQ(std::vector<float>(vector->span().begin(), vector->span().end()), values) << name;
  }
  for (const char* name : {"m32", "m16"}) {
    const auto matrix = checkpoint.LoadDense(name, 2, 3);
    ASSERT_TRUE(matrix.ok()) << matrix.status();
    EXPECT_EQ(matrix->view.type, kernels::DenseType::kFp32);
    EXPECT_EQ(std::memcmp(matrix->view.data, values.data(), 24), 0) << name;
  }
  const auto matrix = checkpoint.LoadDense("mb16", 2, 3);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->view.type, kernels::DenseType::kBf16);
  EXPECT_EQ(std::memcmp(matrix->view.data, bf16.data(), 12), 0);
}

TEST_F(CheckpointTest, EveryHalfIsRead) {
  // Subnormals, the largest, both zeros.
  const std::vector<uint16_t> halves = {0x0001, 0x83ff, 0x7bff, 0xfbff, 0x8000, 0x3555};
  const std::vector<float> expected = {
      5.960464477539063e-08f, -6.097555160522461e-05f, 65504, -65504, -0.0f, 0.333251953125f};
  const auto vector = Open({Words("v", DType::kF16, {6}, halves)}).LoadVector("v", 6);
  ASSERT_TRUE(vector.ok()) << vector.status();
  EXPECT_EQ(std::memcmp(vector->data(), expected.data(), 24), 0);
}

TEST_F(CheckpointTest, VectorsAreFinite) {
  for (const float bad : {kNan, kInf, -kInf}) {
    EXPECT_TRUE(IsInvalid(Open({Floats("v", {2}, {1, bad})}).LoadVector("v", 2).status(),
                          "v holds a NaN or infinite value"));
  }
  EXPECT_TRUE(IsInvalid(Open({Words("v", DType::kF16, {1}, {0x7c00})}).LoadVector("v", 1).status(),
                        "v holds a NaN"));
}

TEST_F(CheckpointTest, NoDirectory) {
  EXPECT_TRUE(IsError(Checkpoint::Open("/nonexistent/model").status(), absl::StatusCode::kNotFound,
                      "/nonexistent/model"));
}

}  // namespace
}  // namespace ternion::runtime

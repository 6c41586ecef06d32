// Bad input ends with one clear line, an exit code that is not 0, no hang and no partial output, on
// one rank and on three.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include "gtest/gtest.h"
#include "tests/launcher/command.h"

namespace ternion::launcher {
namespace {

namespace fs = std::filesystem;

// A copy of the bundled model to break, and a place for outputs.
class Workplace {
 public:
  Workplace() {
    fs::create_directory(model());
    fs::create_directory(directory_.path("out"));
    for (const char* name :
         {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}) {
      fs::copy_file(SourcePath("models/tiny") + "/" + name, file(name));
    }
  }

  std::string model() const { return directory_.path("model"); }
  std::string file(const std::string& name) const { return model() + "/" + name; }
  std::string path(const std::string& name) const { return directory_.path(name); }
  std::string output(const std::string& name) const { return directory_.path("out/" + name); }

  void EditConfig(const std::function<void(Json&)>& edit) const {
    Json config = ReadJson(file("config.json"));
    edit(config);
    WriteText(file("config.json"), config.dump());
  }

  // Replaces the safetensors header, keeping the data.
  void EditHeader(const std::function<void(Json&)>& edit) const {
    const std::string bytes = ReadText(file("model.safetensors"));
    Json header = Json::parse(bytes.substr(8, HeaderBytes(bytes)));
    edit(header);
    const std::string text = header.dump();
    const uint64_t size = text.size();
    std::string prefix(sizeof(size), '\0');
    std::memcpy(prefix.data(), &size, sizeof(size));
    WriteText(file("model.safetensors"), prefix + text + bytes.substr(8 + HeaderBytes(bytes)));
  }

  void SetFloat(const std::string& tensor, float value) const {
    std::string bytes = ReadText(file("model.safetensors"));
    const Json header = Json::parse(bytes.substr(8, HeaderBytes(bytes)));
    const size_t offset = header.at(tensor).at("data_offsets").at(0);
    std::memcpy(&bytes[8 + HeaderBytes(bytes) + offset], &value, sizeof(value));
    WriteText(file("model.safetensors"), bytes);
  }

  void Truncate(uint64_t bytes) const { fs::resize_file(file("model.safetensors"), bytes); }

 private:
  static uint64_t HeaderBytes(const std::string& bytes) {
    uint64_t size = 0;
    std::memcpy(&size, bytes.data(), sizeof(size));
    return size;
  }

  const TempDir directory_;
};

Strings RunArguments(const Workplace& place) {
  return {"run",      "--model", place.model(),          "--prompt",
          "The ship", "--json",  place.output("j.json"), "--max-tokens",
          "8"};
}

// Breaks something and returns the arguments that meet it.
using Setup = std::function<Strings(const Workplace&)>;

struct Case {
  std::string name;
  Setup setup;
  Strings expected;  // parts of the error line
};

void PrintTo(const Case& c, std::ostream* stream) { *stream << c.name; }

// `run` after `break_it`.
Setup Broken(std::function<void(const Workplace&)> break_it) {
  return [=](const Workplace& place) {
    break_it(place);
    return RunArguments(place);
  };
}

Setup Config(const std::string& key, const Json& value) {
  return Broken([=](const Workplace& place) {
    place.EditConfig([&](Json& config) { config[key] = value; });
  });
}

Setup NotANumber(const std::string& tensor, float value) {
  return Broken([=](const Workplace& place) { place.SetFloat(tensor, value); });
}

// `run` with other or further arguments; the last of a repeated flag is not what counts, so those
// of RunArguments are left out by name.
Setup With(const Strings& replaced, std::function<Strings(const Workplace&)> more) {
  return [=](const Workplace& place) {
    Strings arguments = RunArguments(place);
    for (const std::string& flag : replaced) {
      const auto at = std::find(arguments.begin(), arguments.end(), flag);
      arguments.erase(at, at + 2);
    }
    for (const std::string& argument : more(place)) arguments.push_back(argument);
    return arguments;
  };
}

Setup Flags(const Strings& flags) {
  return With({}, [=](const Workplace&) { return flags; });
}

Setup PromptFile(const std::string& text) {
  return With({"--prompt"}, [=](const Workplace& place) -> Strings {
    WriteText(place.path("prompts.txt"), text);
    return {"--prompt-file", place.path("prompts.txt")};
  });
}

Setup PlacementFile(const std::string& text) {
  return With({}, [=](const Workplace& place) -> Strings {
    WriteText(place.path("placement.json"), text);
    return {"--placement", place.path("placement.json")};
  });
}

Setup EvalIds(const std::string& ids, const Strings& more = {}) {
  return [=](const Workplace& place) {
    WriteText(place.path("ids.json"), ids);
    Strings arguments = {"eval",
                         "--model",
                         place.model(),
                         "--ids-file",
                         place.path("ids.json"),
                         "--logits-out",
                         place.output("x.npy")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
}

Setup EvalText(const std::string& text, const Strings& more = {}) {
  return [=](const Workplace& place) {
    WriteText(place.path("text.txt"), text);
    Strings arguments = {"eval",
                         "--model",
                         place.model(),
                         "--text",
                         place.path("text.txt"),
                         "--json",
                         place.output("e.json")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
}

Setup SynthFrom(const std::string& config) {
  return [=](const Workplace& place) -> Strings {
    WriteText(place.path("synth.json"), config);
    return {"synth", "--config", place.path("synth.json"), "--out", place.output("model")};
  };
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::string OneExpertPerRank(const Json& first) {
  Json experts = Json::array({first});
  for (int expert = 1; expert < 16; ++expert) experts.push_back(0);
  return Json{{"experts", experts}}.dump();
}

const Case kCases[] = {
    // Files of the model.
    {"MissingModel", Broken([](auto& place) { fs::remove_all(place.model()); }), {"/model"}},
    {"ModelIsAFile",
     [](auto& place) {
       Strings arguments = RunArguments(place);
       arguments[2] = place.file("config.json");
       return arguments;
     },
     {"config.json"}},
    {"EmptyDirectory",
     Broken([](auto& place) {
       fs::remove_all(place.model());
       fs::create_directory(place.model());
     }),
     {"config.json"}},
    {"MissingConfig",
     Broken([](auto& place) { fs::remove(place.file("config.json")); }),
     {"config.json"}},
    {"MissingWeights",
     Broken([](auto& place) { fs::remove(place.file("model.safetensors")); }),
     {"safetensors"}},
    {"MissingTokenizer",
     Broken([](auto& place) { fs::remove(place.file("tokenizer.json")); }),
     {"tokenizer.json"}},
    {"MalformedTokenizer",
     Broken([](auto& place) { WriteText(place.file("tokenizer.json"), "{\"model\": {"); }),
     {"tokenizer.json"}},
    {"TokenizerOfAnotherKind",
     Broken([](auto& place) {
       WriteText(place.file("tokenizer.json"), R"({"model": {"type": "Unigram", "vocab": []}})");
     }),
     {"tokenizer.json"}},
    {"TokenizerOfALargerVocabulary",
     Broken([](auto& place) {
       Json json = ReadJson(place.file("tokenizer.json"));
       for (auto& [token, id] : json["model"]["vocab"].items())
         id = id.template get<int>() + 100000;
       WriteText(place.file("tokenizer.json"), json.dump());
     }),
     {"token"}},

    // Safetensors.
    {"TruncatedToNothing", Broken([](auto& place) { place.Truncate(0); }), {"model.safetensors"}},
    {"TruncatedInTheLength", Broken([](auto& place) { place.Truncate(5); }), {"model.safetensors"}},
    {"TruncatedInTheHeader",
     Broken([](auto& place) { place.Truncate(1000); }),
     {"model.safetensors"}},
    {"TruncatedInTheData",
     Broken(
         [](auto& place) { place.Truncate(fs::file_size(place.file("model.safetensors")) / 2); }),
     {"model.safetensors"}},
    {"TruncatedByOneByte",
     Broken(
         [](auto& place) { place.Truncate(fs::file_size(place.file("model.safetensors")) - 1); }),
     {"model.safetensors"}},
    {"HugeHeaderLength",
     Broken([](auto& place) {
       std::string bytes = ReadText(place.file("model.safetensors"));
       std::memset(bytes.data(), 0xff, 8);
       WriteText(place.file("model.safetensors"), bytes);
     }),
     {"model.safetensors", "header"}},
    {"HeaderIsNotJson",
     Broken([](auto& place) {
       std::string bytes = ReadText(place.file("model.safetensors"));
       bytes[8] = 'x';
       WriteText(place.file("model.safetensors"), bytes);
     }),
     {"model.safetensors", "parse error"}},
    {"OffsetsPastTheEnd",
     Broken([](auto& place) {
       place.EditHeader([](Json& header) {
         header["model.norm.weight"]["data_offsets"] = {uint64_t{1} << 40,
                                                        (uint64_t{1} << 40) + 512};
       });
     }),
     {"model.norm.weight"}},
    {"OffsetsReversed",
     Broken([](auto& place) {
       place.EditHeader([](Json& header) {
         auto& offsets = header["model.norm.weight"]["data_offsets"];
         std::swap(offsets[0], offsets[1]);
       });
     }),
     {"model.norm.weight"}},
    {"NegativeOffset",
     Broken([](auto& place) {
       place.EditHeader([](Json& header) { header["model.norm.weight"]["data_offsets"][0] = -1; });
     }),
     {"model.norm.weight"}},
    {"ShapeOverflows",
     Broken([](auto& place) {
       place.EditHeader([](Json& header) {
         header["model.norm.weight"]["shape"] = {int64_t{1} << 32, int64_t{1} << 32};
       });
     }),
     {"model.norm.weight"}},
    {"UnknownDtype",
     Broken([](auto& place) {
       place.EditHeader([](Json& header) { header["model.norm.weight"]["dtype"] = "Q7"; });
     }),
     {"Q7"}},
    {"MissingTensor",
     Broken([](auto& place) {
       place.EditHeader([](Json& header) {
         header["other.weight"] = header["model.norm.weight"];
         header.erase("model.norm.weight");
       });
     }),
     {"model.norm.weight"}},

    // Numbers of the model.
    {"NanScaleOnEveryRank",
     NotANumber("model.layers.0.self_attn.q_proj.weight_scale", kNan),
     {"model.layers.0.self_attn.q_proj"}},
    {"NanScaleOnTheLastRank",
     NotANumber("model.layers.3.mlp.experts.15.up_proj.weight_scale", kNan),
     {"model.layers.3.mlp.experts.15.up_proj"}},
    {"InfiniteScale",
     NotANumber("model.layers.1.mlp.experts.15.down_proj.weight_scale", kInfinity),
     {"model.layers.1.mlp.experts.15.down_proj"}},

    // Config.
    {"ConfigIsNotJson",
     Broken([](auto& place) { WriteText(place.file("config.json"), "model_type: bitnet"); }),
     {"config.json"}},
    {"NegativeDimension", Config("hidden_size", -256), {"hidden_size", "-256"}},
    {"HugeDimension", Config("hidden_size", int64_t{1} << 60), {"hidden_size"}},
    {"DimensionPast64Bits", Config("vocab_size", uint64_t{1} << 63), {"vocab_size"}},
    {"DimensionIsText", Config("hidden_size", "256"), {"hidden_size"}},
    {"ManyLayers", Config("num_hidden_layers", 4000), {"model.layers.4"}},
    {"LargeVocabulary", Config("vocab_size", 4000000), {"embed_tokens"}},
    {"ActivationBits", Config("act_bits", 6), {"act_bits 6"}},
    {"KvBits", Config("kv_bits", 5), {"kv_bits 5"}},
    {"OtherDimension", Config("hidden_size", 128), {"model."}},
    {"UnknownModelType", Config("model_type", "gpt2"), {"model_type", "gpt2"}},
    {"MoreExpertsThanTheCheckpoint", Config("num_experts", 17), {"experts"}},
    {"ManyMoreExpertsThanTheCheckpoint", Config("num_experts", 64), {"experts"}},
    {"FewerExpertsThanTheCheckpoint", Config("num_experts", 15), {"experts"}},

    // Prompts.
    {"EmptyPrompt",
     With({"--prompt"},
          [](auto&) -> Strings {
            return {"--prompt", ""};
          }),
     {"--prompt"}},
    {"MissingPromptFile",
     With({"--prompt"},
          [](auto&) -> Strings {
            return {"--prompt-file", "/nowhere/prompts"};
          }),
     {"/nowhere/prompts"}},
    {"EmptyPromptFile", PromptFile(""), {"prompts.txt"}},
    {"EmptyLine", PromptFile("one\n\nthree\n"), {"prompts.txt", "line 2"}},
    {"PromptLongerThanKv",
     With({"--prompt"},
          [](auto&) -> Strings {
            return {"--kv-tokens", "64", "--prompt", std::string(300, 'z')};
          }),
     {"prompt", "KV"}},
    {"SecondPromptLongerThanPositions",
     PromptFile("A short one\n" + std::string(9000, 'z') + "\n"),
     {"prompt", "512"}},
    {"NoPrompt", With({"--prompt"}, [](auto&) -> Strings { return {}; }), {"prompt"}},
    {"TwoPrompts", Flags({"--prompt-file", "x"}), {"prompt"}},

    // Placement.
    {"PlacementNamesARankThatIsNot",
     PlacementFile(OneExpertPerRank(3)),
     {"placement.json", "rank 3"}},
    {"PlacementNamesANegativeRank", PlacementFile(OneExpertPerRank(-1)), {"placement.json", "-1"}},
    {"PlacementWithoutARank", PlacementFile(OneExpertPerRank(Json::array())), {"placement.json"}},
    {"PlacementOfTooFewExperts", PlacementFile(R"({"experts": [0, 0]})"), {"placement.json", "16"}},
    {"PlacementIsNotJson", PlacementFile("contiguous"), {"placement.json"}},
    {"BalancedWithoutATrace", Flags({"--placement", "balanced"}), {"balanced", "--trace"}},
    {"LocalWithAMissingTrace",
     Flags({"--placement", "local", "--trace", "/nowhere/trace"}),
     {"/nowhere/trace"}},
    {"LocalWithATextForATrace",
     Flags({"--placement", "local", "--trace", SourcePath("models/tiny/test.txt")}),
     {"test.txt", "no routing trace"}},
    {"TraceWithoutUse", Flags({"--trace", "/nowhere/trace"}), {"--trace", "--placement"}},
    {"MissingPlacement", Flags({"--placement", "/nowhere/placement"}), {"/nowhere/placement"}},

    // Flags.
    {"UnknownFlag", Flags({"--frobnicate"}), {"--frobnicate"}},
    {"UnknownCommand", [](auto&) -> Strings { return {"frobnicate"}; }, {"frobnicate"}},
    {"NoCommand", [](auto&) -> Strings { return {}; }, {"subcommand"}},
    {"FlagOutOfRange", Flags({"--threads", "-1"}), {"--threads"}},
    {"NotANumber", Flags({"--seed", "x"}), {"--seed"}},
    {"UnknownWire", Flags({"--wire-combine", "fp7"}), {"--wire-combine"}},
    {"UnknownKv", Flags({"--kv", "int2"}), {"--kv"}},
    {"KvThatRotatesOddHeads",
     [](auto& place) -> Strings {
       place.EditConfig([](Json& config) { config["head_dim"] = 48; });
       return {"run", "--model", place.model(), "--prompt", "x", "--kv", "int3"};
     },
     {"int3", "power of two", "48"}},
    {"DispatchBelowTheActivations", Flags({"--wire-dispatch", "int4"}), {"int4 dispatch"}},
    {"HugeKv", Flags({"--kv-tokens", "1099511627776"}), {"KV"}},
    {"NcclBetweenCpus", Flags({"--transport", "nccl"}), {"NCCL", "--device cuda"}},
    {"CudaDevice", Flags({"--device", "cuda"}), {"cuda"}},

    // Output.
    {"JsonIntoNowhere",
     With({"--json"},
          [](auto&) -> Strings {
            return {"--json", "/nowhere/j.json"};
          }),
     {"/nowhere/j.json"}},
    {"JsonOntoADirectory",
     With({"--json"},
          [](auto& place) -> Strings {
            return {"--json", place.model()};
          }),
     {"/model"}},

    // eval.
    {"EvalNothing",
     [](auto& place) -> Strings {
       return {"eval", "--model", place.model()};
     },
     {"--ids-file"}},
    {"IdsAreNotJson", EvalIds("1, 2, 3"), {"ids.json"}},
    {"NoIds", EvalIds("[]"), {"ids.json"}},
    {"IdsAreText", EvalIds(R"(["a"])"), {"ids.json"}},
    {"NegativeId", EvalIds("[1, -2]"), {"ids.json"}},
    {"IdPast64Bits", EvalIds("[1, 18446744073709551615]"), {"ids.json"}},
    {"IdOutsideTheVocabulary", EvalIds("[1, 4096]"), {"4096"}},
    {"IdsLongerThanKv",
     EvalIds(Json(std::vector<int>(200, 5)).dump(), {"--kv-tokens", "64"}),
     {"KV"}},
    {"LogitsIntoNowhere",
     [](auto& place) -> Strings {
       WriteText(place.path("ids.json"), "[1, 2]");
       return {"eval",         "--model",       place.model(), "--ids-file", place.path("ids.json"),
               "--logits-out", "/nowhere/x.npy"};
     },
     {"/nowhere/x.npy"}},
    {"IdsWithoutOutput",
     [](auto& place) -> Strings {
       return {"eval", "--model", place.model(), "--ids-file", "x"};
     },
     {"--logits-out"}},
    {"EmptyText", EvalText(""), {"text.txt"}},
    {"MissingText",
     [](auto& place) -> Strings {
       return {"eval", "--model", place.model(), "--text", "/nowhere/text"};
     },
     {"/nowhere/text"}},
    {"LadderOfIds", EvalIds("[1, 2]", {"--ladder"}), {"--ladder"}},
    {"LadderWithAWire",
     EvalText("The ship was", {"--ladder", "--wire-combine", "int8"}),
     {"--wire"}},
    {"LadderWithACache", EvalText("The ship was", {"--ladder", "--kv", "int4"}), {"--kv"}},
    {"LadderOfNothing", EvalText("", {"--ladder"}), {"text.txt"}},
    {"RecordingOfIds", EvalIds("[1, 2]", {"--record-trace", "t"}), {"--record-trace", "--text"}},
    {"RecordingOfALadder",
     EvalText("The ship was", {"--ladder", "--record-trace", "t"}),
     {"--record-trace", "--ladder"}},
    {"RecordingWithAWire",
     EvalText("The ship was", {"--record-trace", "t", "--wire-combine", "int8"}),
     {"--record-trace", "--wire-combine"}},
    {"RecordingToNowhere",
     EvalText("The ship was", {"--record-trace", "/nowhere/trace"}),
     {"/nowhere/trace"}},

    // inspect and synth.
    {"InspectNothing",
     [](auto& place) -> Strings {
       return {"inspect", "--model", place.path("none")};
     },
     {"none"}},
    {"InspectTruncated",
     [](auto& place) -> Strings {
       place.Truncate(5000);
       return {"inspect", "--model", place.model()};
     },
     {"model.safetensors"}},
    {"SynthUnknownShape",
     [](auto& place) -> Strings {
       return {"synth", "--shape", "bitnet-3b", "--out", place.output("model")};
     },
     {"bitnet-3b", "bitnet-2b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"}},
    {"SynthNotJson", SynthFrom("hidden_size = 3"), {"synth.json"}},
    {"SynthUnknownModelType", SynthFrom(R"({"model_type": "gpt2"})"), {"gpt2"}},
    {"SynthNegative", SynthFrom(R"({"model_type": "bitnet", "vocab_size": -5})"), {"vocab_size"}},
    // Small, so that a command that accepts it does no harm.
    {"SynthWithoutOut",
     [](auto& place) -> Strings {
       return {"synth", "--config", place.file("config.json"), "--out", ""};
     },
     {"--out"}},
    // Eleven terabytes.
    {"SynthOfMoreThanTheDisk",
     SynthFrom(R"({"model_type": "bitnet", "vocab_size": 1000, "hidden_size": 60000,
                   "num_hidden_layers": 4000, "num_attention_heads": 10, "head_dim": 100,
                   "hidden_act": "relu2", "intermediate_size": 60000, "rms_norm_eps": 1e-5,
                   "max_position_embeddings": 128})"),
     {"disk"}},
    {"SynthOutExists",
     [](auto& place)
         -> Strings { return {"synth", "--shape", "bitnet-2b", "--out", place.model()}; },
     {"/model", "exists"}},
};

class BadInput : public testing::TestWithParam<Case> {
 protected:
  void Check(int ranks) {
    SCOPED_TRACE(ranks);
    const Workplace place;
    const Strings arguments = GetParam().setup(place);
    const CommandResult result = RunTernion(ranks, arguments);
    EXPECT_FALSE(result.timed_out);
    EXPECT_GT(result.exit_code, 0);
    EXPECT_LT(result.exit_code, 128) << "ended by a signal";
    const Strings lines = LinesThatStartWith(result.err, "ternion: error:");
    EXPECT_EQ(lines.size(), 1u) << result.err;
    for (const std::string& part : GetParam().expected) {
      EXPECT_TRUE(!lines.empty() && lines[0].find(part) != std::string::npos)
          << part << " is not in: " << result.err;
    }
    EXPECT_TRUE(fs::is_empty(place.path("out")))
        << fs::directory_iterator(place.path("out"))->path();
    // mpirun adds a block of its own.
    EXPECT_TRUE(ranks > 0 || (!lines.empty() && result.err == lines[0] + "\n")) << result.err;
  }
};

TEST_P(BadInput, OneProcess) { Check(0); }
TEST_P(BadInput, ThreeRanks) { Check(3); }

INSTANTIATE_TEST_SUITE_P(All, BadInput, testing::ValuesIn(kCases),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace ternion::launcher

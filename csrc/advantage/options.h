// Names of the choices as Python spells them -> Options and types. The one place that knows both, for hiexp._core and
// hiexp._cuda.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "advantage/batch.h"

namespace hiexp::advantage {

template <typename Enum>
Enum choose(const char* argument, const std::string& name,
            std::initializer_list<std::pair<const char*, Enum>> choices) {
  std::string expected;
  for (const auto& [candidate, value] : choices) {
    if (name == candidate) return value;
    expected += (expected.empty() ? "'" : ", '") + std::string(candidate) + "'";
  }
  throw std::invalid_argument(std::string(argument) + ": expected one of " + expected + ", got '" + name + "'");
}

inline Options make_options(const std::string& baseline, const std::string& scale, const std::string& singleton,
                            int ddof, double eps) {
  return Options{
      choose<Baseline>(
          "baseline", baseline,
          {{"mean", Baseline::kMean}, {"leave_one_out", Baseline::kLeaveOneOut}, {"none", Baseline::kNone}}),
      choose<Scale>("scale", scale, {{"std", Scale::kStd}, {"none", Scale::kNone}, {"batch", Scale::kBatch}}),
      choose<Singleton>("singleton", singleton, {{"zero", Singleton::kZero}, {"raw", Singleton::kRaw}}), ddof, eps};
}

inline LabelType label_type(const std::string& name) {
  return choose<LabelType>("group_ids", name,
                           {{"int8", LabelType::kInt8},
                            {"int16", LabelType::kInt16},
                            {"int32", LabelType::kInt32},
                            {"int64", LabelType::kInt64},
                            {"uint8", LabelType::kUint8},
                            {"uint16", LabelType::kUint16},
                            {"uint32", LabelType::kUint32},
                            {"bool", LabelType::kUint8}});
}

}  // namespace hiexp::advantage

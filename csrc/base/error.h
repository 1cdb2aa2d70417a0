// The one exception type the engine throws; the bindings turn it into espalier.EngineError.
#pragma once

#include <stdexcept>
#include <string>

namespace espalier {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const std::string& message) { throw Error(message); }

inline void require(bool condition, const char* message) {
  if (!condition) fail(message);
}

}  // namespace espalier

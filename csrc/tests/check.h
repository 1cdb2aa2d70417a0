// Tests without a framework: TEST defines one, CHECK and its kin report and go on, main() runs what its arguments name.
#pragma once

#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace testing {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}
inline int& checks() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline void report(const char* file, int line, const std::string& what) {
  if (++failures() <= 40) std::cerr << file << ":" << line << ": " << what << "\n";
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Runs the tests whose name contains one of the arguments, or all of them. Choosing none is an error.
inline int run(int argc, char** argv) {
  int ran = 0;
  for (const Test& test : tests()) {
    bool chosen = argc < 2;
    for (int i = 1; i < argc; ++i) chosen = chosen || std::string(test.name).find(argv[i]) != std::string::npos;
    if (!chosen) continue;
    ++ran;
    const int before = failures();
    try {
      test.body();
    } catch (const std::exception& error) {
      report(test.name, 0, text("threw ", error.what()));
    }
    std::cerr << (failures() == before ? "ok    " : "FAIL  ") << test.name << "\n";
  }
  std::cerr << ran << " tests, " << checks() << " checks, " << failures() << " failures\n";
  return ran == 0 || checks() == 0 || failures() != 0;
}

}  // namespace testing

#define TEST(name)                                                \
  static void name();                                             \
  static const ::testing::Register register_##name{#name, &name}; \
  static void name()

// CHECK(condition, parts of a message...)
#define CHECK(condition, ...)                                                                                          \
  do {                                                                                                                 \
    ++::testing::checks();                                                                                             \
    if (!(condition)) ::testing::report(__FILE__, __LINE__, ::testing::text("CHECK(" #condition ") ", ##__VA_ARGS__)); \
  } while (false)

#define CHECK_THROWS(expression, fragment)                                                                          \
  do {                                                                                                              \
    ++::testing::checks();                                                                                          \
    try {                                                                                                           \
      expression;                                                                                                   \
      ::testing::report(__FILE__, __LINE__, #expression " did not throw");                                          \
    } catch (const ::espalier::Error& error) {                                                                      \
      if (std::string(error.what()).find(fragment) == std::string::npos)                                            \
        ::testing::report(__FILE__, __LINE__, ::testing::text(#expression " threw another error: ", error.what())); \
    }                                                                                                               \
  } while (false)

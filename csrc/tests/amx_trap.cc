#include "amx_trap.h"

#if defined(__x86_64__) && defined(__linux__)

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

#include "base/arch.h"
#include "kernels/reference/tiles.h"

namespace testing {

namespace {

using espalier::reference::tile_registers;

// An instruction of three bytes of VEX prefix, opcode and operands, as Intel's manual encodes them (volume 2, chapter
// 2).
class Instruction {
 public:
  Instruction(const std::uint8_t* at, const greg_t* registers) : at_(at), registers_(registers) {
    if (modrm() >> 6 != 3) decode_memory();
  }

  bool is_tile() const { return at_[0] == 0xc4 && (at_[1] & 0x1f) == 2 && (at_[2] & 0x84) == 0; }  // map 2, W0, 128
  // Opcode and mandatory prefix: 0, 1, 2, 3 for none, 66, F3, F2.
  int code() const { return at_[3] << 4 | (at_[2] & 3); }
  bool has_memory() const { return modrm() >> 6 != 3; }
  int reg() const { return modrm() >> 3 & 7; }
  int rm() const { return modrm() & 7; }
  int vvvv() const { return ~(at_[2] >> 3) & 15; }
  char* address() const { return reinterpret_cast<char*>(base_); }
  long index() const { return index_; }
  int length() const { return length_; }

 private:
  std::uint8_t modrm() const { return at_[4]; }

  std::int64_t general(int number) const {
    static constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kOrder[number]];
  }

  // [base + index << scale + displacement], without the forms that the kernels have no use for.
  void decode_memory() {
    const int mod = modrm() >> 6, b = at_[1] & 0x20 ? 0 : 8, x = at_[1] & 0x40 ? 0 : 8;
    const bool sib = rm() == 4;
    const int base = sib ? at_[5] & 7 : rm(), index = sib ? (at_[5] >> 3 & 7) + x : 4;
    length_ += sib;
    base_ = general(base + b);
    if (index != 4) index_ = general(index) << (at_[5] >> 6);
    if (mod == 1) base_ += static_cast<std::int8_t>(at_[length_]);
    std::int32_t displacement;
    std::memcpy(&displacement, at_ + length_, sizeof displacement);
    if (mod == 2) base_ += displacement;
    length_ += mod == 1 ? 1 : mod == 2 ? 4 : 0;
  }

  const std::uint8_t* at_;
  const greg_t* registers_;
  std::int64_t base_ = 0;
  long index_ = 0;
  int length_ = 5;
};

bool execute(const Instruction& i) {
  switch (i.is_tile() ? i.code() : 0) {
    case 0x490:
      if (i.has_memory())
        tile_registers.configure(i.address() + i.index());
      else
        tile_registers.release();
      return true;
    case 0x493:
      tile_registers.zero(i.reg());
      return true;
    case 0x4b3:
      tile_registers.load(i.reg(), i.address(), i.index());
      return true;
    case 0x4b2:
      tile_registers.store(i.reg(), i.address(), i.index());
      return true;
    case 0x5e2:
      tile_registers.dot(i.reg(), i.rm(), i.vvvv());
      return true;
  }
  return false;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction instruction(reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]), registers);
  if (execute(instruction))
    registers[REG_RIP] += instruction.length();
  else
    signal(SIGILL, SIG_DFL);  // it traps once more, and ends the process as it would have
}

}  // namespace

const espalier::KernelSet* trapped_amx_kernels() {
  const espalier::ArchFlags flags = espalier::detect_arch();
  if (!flags.avx512_vnni || flags.amx_int8) return nullptr;
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  return espalier::avx512_amx_kernels();
}

}  // namespace testing

#else

const espalier::KernelSet* testing::trapped_amx_kernels() { return nullptr; }

#endif

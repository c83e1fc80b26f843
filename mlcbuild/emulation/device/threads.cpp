#include "threads.h"

#include <sys/mman.h>

#include <stdarg.h>
#include <stdio.h>

namespace emulation {

Index thread_index, block_index, block_size, grid_size;
int thread;

namespace {

constexpr size_t STACK = 1 << 17, PAGE = 1 << 14;  // bytes; pages of the hosts that there are have at most 16 KB
constexpr int SLOTS = 64;
constexpr int DYNAMIC = SLOTS;  // the slot of dynamic shared memory

enum State { READY, AT_BARRIER, AT_EXCHANGE, ENDED };

struct Fiber {
  void* stack_pointer;
  State state;
  uint32_t given, taken;
  int source;  // the thread whose value it takes
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Slot {
  char* end;  // the page behind it is closed
  size_t room, bytes;
  bool fresh;
};

constexpr int COPIES = 256;  // of a thread, on their way

Fiber fibers[MOST_THREADS];
Copy copies[MOST_THREADS][COPIES];
int waiting[MOST_THREADS], groups[MOST_THREADS];  // copies of a thread, and groups that it has ended
Slot slots[SLOTS + 1];
char* stacks;
void* scheduler;  // its stack pointer
Thunk running;
void** running_arguments;
long waited;  // threads, for the kernel before
bool hidden;  // is what kernels write

// Saves the callee's registers on this stack, keeps the stack pointer in *save, and goes on at `to`.
extern "C" void emulation_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
emulation_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
constexpr int RETURN_AT = 6, FRAME = 8;  // words: the frame keeps the ABI's alignment of 16 bytes
#else
#error "the emulated device runs on x86-64"
#endif

void wait(State state) {
  Fiber& own = fibers[thread];
  own.state = state;
  emulation_switch(&own.stack_pointer, scheduler);
}

void body() {
  running(running_arguments);
  wait_for_copies(-1);  // those that nobody waited for come at some time, too
  wait(ENDED);
}

void start(int number) {
  void** frame = reinterpret_cast<void**>(stacks + (number + 1) * STACK) - FRAME;
  memset(frame, 0, FRAME * sizeof(void*));
  frame[RETURN_AT] = reinterpret_cast<void*>(body);
  fibers[number] = {frame, READY, 0, 0, 0};
  waiting[number] = groups[number] = 0;
}

int in_order(int place, int count, int order) {
  if (order == FORWARD) return place;
  if (order == BACKWARD) return count - 1 - place;
  constexpr int STRIDE = 7919;  // a prime above any count, so that every number comes once
  return static_cast<int>((static_cast<long>(place) * STRIDE + 13) % count);
}

bool tell(const Launch& launch, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(launch.problem, launch.problem_size, format, values);
  va_end(values);
  return false;
}

void resume_ready(int count, int order) {
  for (int place = 0; place < count; place++) {
    const int next = in_order(place, count, order);
    if (fibers[next].state != READY) continue;
    thread = next;
    const unsigned n = next, x = block_size.x, y = block_size.y;
    thread_index = {n % x, n / x % y, n / x / y};
    emulation_switch(&scheduler, fibers[next].stack_pointer);
  }
}

// Let the threads that wait for their warps go on. All lanes of a warp that take part have arrived by then: whoever is
// not at an exchange waits at a barrier or has ended.
bool exchange_all(int count) {
  bool any = false;
  for (int i = 0; i < count; i++) {
    if (fibers[i].state != AT_EXCHANGE) continue;
    any = true;
    const int source = fibers[i].source;
    const bool there = source >= 0 && source < count && fibers[source].state == AT_EXCHANGE;
    fibers[i].taken = there ? fibers[source].given : 0xffffffffu;
  }
  for (int i = 0; i < count; i++)
    if (fibers[i].state == AT_EXCHANGE) fibers[i].state = READY;
  return any;
}

bool run_block(const Launch& launch, int count) {
  for (Slot& slot : slots) slot.fresh = true;
  for (int i = 0; i < count; i++) start(i);
  for (;;) {
    resume_ready(count, launch.order);
    if (exchange_all(count)) continue;
    if (hidden && waited) launch.hide(hidden = false);
    int ended = 0;
    for (int i = 0; i < count; i++) ended += fibers[i].state == ENDED;
    if (ended == count) return true;
    if (ended) return tell(launch, "%d of %d threads wait at a barrier that the others never reach", count - ended, count);
    for (int i = 0; i < count; i++) fibers[i].state = READY;
  }
}

}  // namespace

bool run(Thunk thunk, void** arguments, const Launch& launch) {
  if (!stacks) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (stacks == MAP_FAILED) return tell(launch, "no memory for the stacks of %d threads", MOST_THREADS);
  }
  const int count = launch.block.x * launch.block.y * launch.block.z;
  const long blocks = static_cast<long>(launch.grid.x) * launch.grid.y * launch.grid.z;
  if (count < 1 || count > MOST_THREADS) return tell(launch, "blocks of %d threads", count);
  if (blocks < 1) return tell(launch, "an empty grid");
  running = thunk, running_arguments = arguments;
  block_size = launch.block, grid_size = launch.grid;
  slots[DYNAMIC].bytes = launch.shared_bytes, waited = 0;
  if (launch.early && launch.hide) launch.hide(hidden = true);
  for (long place = 0; place < blocks; place++) {
    const long n = launch.order == BACKWARD ? blocks - 1 - place : place;
    const long x = launch.grid.x, y = launch.grid.y;
    block_index = {unsigned(n % x), unsigned(n / x % y), unsigned(n / x / y)};
    if (!run_block(launch, count)) return false;
  }
  if (launch.early && waited != blocks * count) return tell(launch, "threads that do not wait for the kernel before");
  return true;
}

void wait_for_block() { wait(AT_BARRIER); }

void wait_for_kernel() {
  waited++;
  if (hidden) wait(AT_BARRIER);
}

void wait_for_warp() { exchange(0, thread % WARP); }

uint32_t exchange(uint32_t value, int lane) {
  const int own = thread;
  fibers[own].given = value;
  fibers[own].source = lane < 0 || lane >= WARP ? -1 : own / WARP * WARP + lane;
  wait(AT_EXCHANGE);
  return fibers[own].taken;
}

void copy_later(void* to, const void* from, size_t bytes) {
  if (waiting[thread] == COPIES) __builtin_trap();
  memset(to, 0xff, bytes);
  copies[thread][waiting[thread]++] = {to, from, bytes, groups[thread]};
}

void end_of_copies() { groups[thread]++; }

void wait_for_copies(int last) {
  Copy* own = copies[thread];
  int kept = 0;
  for (int i = 0; i < waiting[thread]; i++) {
    if (own[i].group >= groups[thread] - last) own[kept++] = own[i];
    else if (own[i].from) memcpy(own[i].to, own[i].from, own[i].bytes);
    else memset(own[i].to, 0, own[i].bytes);
  }
  waiting[thread] = kept;
}

void* shared(int number, size_t bytes) {
  Slot& slot = slots[number];
  if (slot.room < bytes) {
    const size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    char* memory = static_cast<char*>(mmap(nullptr, room + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0));
    mprotect(memory + room, PAGE, PROT_NONE);
    slot.end = memory + room, slot.room = room;
  }
  char* begin = slot.end - (bytes + 15) / 16 * 16;  // as close to the closed page as the alignment of vectors allows
  if (slot.fresh) memset(begin, 0xff, bytes);
  slot.fresh = false;
  return begin;
}

void* dynamic_shared() { return shared(DYNAMIC, slots[DYNAMIC].bytes); }

}  // namespace emulation

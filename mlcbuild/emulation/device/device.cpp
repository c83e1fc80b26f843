#define _GNU_SOURCE 1
#include "device.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

namespace emulation {

struct Module {
  const Module* next;
  void* handle;
  const Kernel* kernels;
  bool (*run)(Thunk, void**, const Launch&);
};

char problem[300] = "no problem";

namespace {

constexpr size_t PAGE = 1 << 14, POISONED = 1 << 28;  // bytes; larger allocations are not filled
constexpr char EARLY[] = "touches what kernels write before it waits for the one before";
constexpr char HEADER[] = "mlcbuild kernels";  // 16 bytes, then the length of the shared object in 8

struct Allocation {
  Allocation* next;
  char* begin;
  size_t bytes;
  char* pages;  // of `room` bytes; the allocation ends where they end, but for its alignment
  size_t room;
  char *before, *first;  // the pages that the running kernel has opened: as they were, and as the first order left them
  bool *opened, *written;  // by page: by the running kernel; by any
};

struct Note {
  Note* next;
  const char* kernel;
  char text[200];
};

Allocation* allocations;
const Module* modules;
Function* functions;
Note* notes;
bool checking, hiding;
const char* running;  // the kernel, for the handler of signals
sigjmp_buf out_of_kernel;
char fault[200];

void note(const char* kernel, const char* text) {
  for (Note* known = notes; known; known = known->next)
    if (known->kernel == kernel && !strcmp(known->text, text)) return;
  Note* added = static_cast<Note*>(calloc(1, sizeof(Note)));
  added->next = notes, added->kernel = kernel;
  snprintf(added->text, sizeof(added->text), "%s", text);
  notes = added;
}

// Close what kernels write, or open it again.
void hide(bool on) {
  hiding = on;
  for (Allocation* one = allocations; one; one = one->next)
    for (size_t page = 0; one->opened && page < one->room / PAGE; page++)
      if (one->written[page])
        mprotect(one->pages + page * PAGE, PAGE, on ? PROT_NONE : one->opened[page] ? PROT_READ | PROT_WRITE : PROT_READ);
}

bool hides(const char* at) {
  for (Allocation* one = allocations; one && hiding; one = one->next)
    if (one->opened && at >= one->pages && at < one->pages + one->room) return one->written[(at - one->pages) / PAGE];
  return false;
}

char* map(size_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

// Let the page be written to; what a kernel writes to is kept as it is first. False where it is none of ours, or open
// already.
bool open_page(char* at) {
  for (Allocation* one = allocations; one; one = one->next) {
    if (at < one->pages || at >= one->pages + one->room) continue;
    const size_t page = (at - one->pages) / PAGE;
    if (!one->opened || one->opened[page]) return false;
    one->opened[page] = true;
    if (running) {
      one->written[page] = true;
      if (hiding) note(running, EARLY);
      memcpy(one->before + page * PAGE, one->pages + page * PAGE, PAGE);
      memcpy(one->first + page * PAGE, one->pages + page * PAGE, PAGE);
    }
    mprotect(one->pages + page * PAGE, PAGE, PROT_READ | PROT_WRITE);
    return true;
  }
  return false;
}

// A kernel that touches what it may not is a failed launch: its threads are left where they are.
void on_fault(int number, siginfo_t* info, void*) {
  char* at = static_cast<char*>(info->si_addr);
  if (running && number == SIGSEGV && hides(at)) return note(running, EARLY), hide(false);
  if (checking && number == SIGSEGV && open_page(at)) return;
  if (!running) {
    signal(number, SIG_DFL);
    return;
  }
  const bool outside = number == SIGSEGV || number == SIGBUS;
  const char* what = outside ? "touches memory that is not its own" : "makes an access that is not aligned";
  snprintf(fault, sizeof(fault), "%s", what);
  for (Allocation* one = allocations; one && outside; one = one->next) {
    const long behind = at - (one->begin + one->bytes), before = one->begin - at;
    if ((behind >= 0 && behind < long(PAGE)) || (before > 0 && before <= long(PAGE)))
      snprintf(fault, sizeof(fault), "touches byte %ld %s an allocation of %zu bytes", behind >= 0 ? behind + 1 : before,
               behind >= 0 ? "behind" : "before", one->bytes);
  }
  siglongjmp(out_of_kernel, 1);
}

void watch() {
  static bool watched;
  if (watched) return;
  watched = true;
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  stack_t stack = {};
  stack.ss_size = 1 << 16;
  stack.ss_sp = malloc(stack.ss_size);
  sigaltstack(&stack, nullptr);
  const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  for (int number : faults) sigaction(number, &action, nullptr);
}

// Call `each` with every page that the running kernel has opened.
template <class Each>
void opened_pages(Each each) {
  for (Allocation* one = allocations; one; one = one->next)
    for (size_t page = 0; page * PAGE < one->room; page++)
      if (one->opened[page]) each(*one, page * PAGE);
}

// Close what is open. Pages stay closed between kernels, as most are never written to again: to close and open all of
// them takes the system longer than many a kernel.
void close_all() {
  for (Allocation* one = allocations; one; one = one->next) {
    const size_t pages = one->room / PAGE;
    if (!one->opened) {
      one->opened = static_cast<bool*>(malloc(pages));
      memset(one->opened, 1, pages);
      one->written = static_cast<bool*>(calloc(1, pages));
      one->before = map(one->room, PROT_READ | PROT_WRITE), one->first = map(one->room, PROT_READ | PROT_WRITE);
    }
    for (size_t page = 0, end; page < pages; page = end) {
      for (end = page; end < pages && one->opened[end];) one->opened[end++] = false;
      if (end > page) mprotect(one->pages + page * PAGE, (end - page) * PAGE, PROT_READ);
      else end++;
    }
  }
}

void open_all() {
  for (Allocation* one = allocations; one; one = one->next) {
    mprotect(one->pages, one->room, PROT_READ | PROT_WRITE);
    if (one->opened) memset(one->opened, 1, one->room / PAGE);
  }
}

void compare(const char* kernel, int order) {
  long bytes = 0;
  opened_pages([&](const Allocation& one, size_t at) {
    if (!memcmp(one.pages + at, one.first + at, PAGE)) return;
    for (size_t i = at; i < at + PAGE; i++) bytes += one.pages[i] != one.first[i];
  });
  if (!bytes) return;
  char text[200];
  snprintf(text, sizeof(text), "a race: thread orders 0 and %d differ in %ld bytes", order, bytes);
  note(kernel, text);
}

struct Running {
  Function& function;
  Index grid, block;
  size_t shared_bytes;
  bool early;
  void** arguments;
};

bool run_in_order(Running& work, int order) {
  char text[200] = "";
  const Launch launch = {work.grid, work.block, work.shared_bytes, order, work.early, checking ? hide : nullptr, text, sizeof(text)};
  const Kernel& kernel = *work.function.kernel;
  running = kernel.name;
  bool fine = false;
  if (sigsetjmp(out_of_kernel, 1) == 0) fine = work.function.module->run(kernel.thunk, work.arguments, launch);
  else snprintf(text, sizeof(text), "%s", fault);
  running = nullptr;
  if (hiding) hide(false);
  if (!fine) {
    snprintf(problem, sizeof(problem), "%s: %s", kernel.name, text);
    note(kernel.name, text);
  }
  return fine;
}

}  // namespace

bool run(Function& function, Index grid, Index block, size_t shared_bytes, bool early, void** arguments) {
  watch();
  function.launches++;
  Running work = {function, grid, block, shared_bytes, early, arguments};
  if (!checking) return run_in_order(work, FORWARD);
  close_all();
  bool fine = true;
  for (int order = 0; order < ORDERS && fine; order++) {
    if (order) opened_pages([](Allocation& one, size_t at) { memcpy(one.pages + at, one.before + at, PAGE); });
    fine = run_in_order(work, order);
    if (order) compare(function.kernel->name, order);
    else opened_pages([](Allocation& one, size_t at) { memcpy(one.first + at, one.pages + at, PAGE); });
  }
  return fine;
}

static Module* no_module(const char* text) {
  snprintf(problem, sizeof(problem), "%s", text);
  return nullptr;
}

Module* load(const void* image) {
  const char* bytes = static_cast<const char*>(image);
  if (memcmp(bytes, HEADER, 16)) return no_module("the library holds kernels for a real device: build it for the emulated one");
  uint64_t length;
  memcpy(&length, bytes + 16, 8);
  const int file = memfd_create("kernels", MFD_CLOEXEC);
  for (uint64_t done = 0; done < length;) {
    const ssize_t wrote = write(file, bytes + 24 + done, length - done);
    if (wrote <= 0) return no_module("no memory for the module");
    done += wrote;
  }
  char path[64];
  snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
  Module* module = static_cast<Module*>(calloc(1, sizeof(Module)));
  module->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);  // the file stays open: another module would get its path
  if (!module->handle) return no_module(dlerror());
  module->kernels = static_cast<const Kernel*>(dlsym(module->handle, "emulation_kernels"));
  module->run = reinterpret_cast<decltype(module->run)>(dlsym(module->handle, "emulation_run"));
  module->next = modules, modules = module;
  return module;
}

Function* find(const Module* module, const char* name) {
  for (const Kernel* kernel = module->kernels; kernel->name; kernel++) {
    if (strcmp(kernel->name, name)) continue;
    Function* function = static_cast<Function*>(calloc(1, sizeof(Function)));
    function->next = functions, function->module = module, function->kernel = kernel;
    return functions = function;
  }
  return nullptr;
}

void* allocate(size_t bytes) {
  Allocation* one = static_cast<Allocation*>(calloc(1, sizeof(Allocation)));
  one->room = (bytes + PAGE - 1) / PAGE * PAGE, one->bytes = bytes;
  char* memory = map(one->room + 2 * PAGE, PROT_NONE);
  if (!memory) return nullptr;
  one->pages = memory + PAGE;
  mprotect(one->pages, one->room, PROT_READ | PROT_WRITE);
  one->begin = one->pages + one->room - (bytes + 255) / 256 * 256;  // aligned as a device's allocations are
  if (bytes <= POISONED) memset(one->pages, 0xff, one->room);
  one->next = allocations, allocations = one;
  return one->begin;
}

bool release(void* place) {
  for (Allocation** link = &allocations; *link; link = &(*link)->next) {
    Allocation* one = *link;
    if (one->begin != place) continue;
    *link = one->next;
    munmap(one->pages - PAGE, one->room + 2 * PAGE);
    if (one->opened) munmap(one->before, one->room), munmap(one->first, one->room), free(one->opened), free(one->written);
    free(one);
    return true;
  }
  return place == nullptr;
}

}  // namespace emulation

// The door for who has no other API: kernels.py.
EXPORTED void* emulation_allocate(size_t bytes) { return emulation::allocate(bytes); }
EXPORTED void emulation_release(void* place) { emulation::release(place); }
EXPORTED void* emulation_load(const void* image) { return emulation::load(image); }
EXPORTED void* emulation_find(const void* module, const char* kernel) {
  return emulation::find(static_cast<const emulation::Module*>(module), kernel);
}
// `sizes`: blocks along x, y, z, threads of a block along these, bytes of dynamic shared memory, and whether it is early.
EXPORTED int emulation_launch(void* function, const unsigned* sizes, void** arguments) {
  const emulation::Index grid = {sizes[0], sizes[1], sizes[2]}, block = {sizes[3], sizes[4], sizes[5]};
  return emulation::run(*static_cast<emulation::Function*>(function), grid, block, sizes[6], sizes[7], arguments);
}
EXPORTED const char* emulation_problem() { return emulation::problem; }

// What was noted, a line each: `note KERNEL TEXT`, and for every kernel of the modules `ran KERNEL LAUNCHES`. Returns the
// length that it needs.
EXPORTED size_t emulation_report(char* out, size_t room) {
  size_t length = 0;
  auto line = [&](const char* what, const char* kernel, const char* text) {
    const size_t left = length < room ? room - length : 0;
    length += snprintf(left ? out + length : nullptr, left, "%s %s %s\n", what, kernel, text);
  };
  for (emulation::Note* one = emulation::notes; one; one = one->next) line("note", one->kernel, one->text);
  for (const emulation::Module* one = emulation::modules; one; one = one->next)
    for (const emulation::Kernel* kernel = one->kernels; kernel->name; kernel++) line("ran", kernel->name, "0");
  for (emulation::Function* one = emulation::functions; one; one = one->next) {
    char count[32];
    snprintf(count, sizeof(count), "%ld", one->launches);
    line("ran", one->kernel->name, count);
  }
  return length;
}

// Notes from now on are of what comes now.
EXPORTED void emulation_forget() { emulation::notes = nullptr; }

EXPORTED void emulation_check(int on) {
  emulation::checking = on;
  if (!on) emulation::open_all();
}

// Memory: the threads' scratch space, and huge pages behind weights.
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel_table.h"
#include "kernels.h"

#if defined(__linux__) && !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25  // Linux 6.1; the C library here may be older than the kernel that runs
#endif

namespace deadband {
namespace {

// Freed when its thread ends. Through a pthread key: a C++ destructor would bring in the C++ runtime library.
struct Workspaces {
  void* data[kSlots];
  size_t bytes[kSlots];
};
__thread Workspaces workspaces;
pthread_key_t workspaces_key;
pthread_once_t workspaces_once = PTHREAD_ONCE_INIT;

void free_workspaces(void* own) {
  for (void* p : ((Workspaces*)own)->data) free(p);
}
void make_workspaces_key() { pthread_key_create(&workspaces_key, free_workspaces); }

}  // namespace

void* workspace(WorkspaceSlot slot, size_t bytes) {
  Workspaces& own = workspaces;
  if (!own.data[slot] || own.bytes[slot] < bytes) {
    pthread_once(&workspaces_once, make_workspaces_key);
    pthread_setspecific(workspaces_key, &own);
    free(own.data[slot]);
    own.bytes[slot] = 0;
    size_t grown = (bytes + bytes / 4 + 4096) & ~(size_t)4095;
    if (posix_memalign(&own.data[slot], 64, grown)) return own.data[slot] = nullptr;
    own.bytes[slot] = grown;
  }
  return own.data[slot];
}

}  // namespace deadband

int deadband_advise_huge(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  uintptr_t begin = ((uintptr_t)data + page - 1) & ~(page - 1);
  uintptr_t end = ((uintptr_t)data + (bytes > 0 ? (uintptr_t)bytes : 0)) & ~(page - 1);
  if (data && begin < end) {
    int taken = madvise((void*)begin, end - begin, MADV_HUGEPAGE) == 0;
#ifdef MADV_COLLAPSE
    // Memory that malloc hands out again has its small pages already; newer Linux joins those on request.
    const uintptr_t huge = 2 << 20;
    begin = (begin + huge - 1) & ~(huge - 1);
    end &= ~(huge - 1);
    if (taken && begin < end) madvise((void*)begin, end - begin, MADV_COLLAPSE);
#endif
    return taken;
  }
#endif
  return 0;
}

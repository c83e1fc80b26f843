// Runs a model library on a machine without Python: driver LIBRARY RUNTIME PARAMETERS IDS LOGITS
//
// RUNTIME is TVM's runtime library. PARAMETERS lists tensors, one a line: file, offset, dtype code, bits, dimensions.
// IDS holds int32 token ids. The ids are prefilled but for the last four, which are decoded one by one; LOGITS gets
// float32 [5, vocab_size]: after the prefill and after each decoded token.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tvm/ffi/c_api.h>

#ifdef _WIN32
__declspec(dllimport) void *LoadLibraryA(const char *);
#define OPEN(path) LoadLibraryA(path)
#else
#include <dlfcn.h>
#define OPEN(path) dlopen(path, RTLD_NOW | RTLD_GLOBAL)
#endif

enum { DECODED = 4, MOST = 4096 };

static void fail(const char *what) {
    TVMFFIObjectHandle error = NULL;
    TVMFFIErrorMoveFromRaised(&error);
    const char *message = error ? ((TVMFFIErrorCell *)((char *)error + sizeof(TVMFFIObject)))->message.data : "";
    fprintf(stderr, "driver: %s failed: %s\n", what, message);
    exit(1);
}

static TVMFFIAny integer(int64_t value) { return (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = value}; }
static TVMFFIAny text(const char *value) { return (TVMFFIAny){.type_index = kTVMFFIRawStr, .v_c_str = value}; }
static TVMFFIAny object(void *value) {
    return (TVMFFIAny){.type_index = ((TVMFFIObject *)value)->type_index, .v_obj = value};
}

static TVMFFIAny call(const char *what, void *function, TVMFFIAny *arguments, int count) {
    TVMFFIAny result = {0};
    if (TVMFFIFunctionCall(function, arguments, count, &result)) fail(what);
    return result;
}

static void *global(const char *name) {
    TVMFFIByteArray bytes = {name, strlen(name)};
    void *function = NULL;
    if (TVMFFIFunctionGetGlobal(&bytes, &function) || !function) fail(name);
    return function;
}

#define CALL(function, ...) \
    call(#function #__VA_ARGS__, function, (TVMFFIAny[]){__VA_ARGS__}, sizeof((TVMFFIAny[]){__VA_ARGS__}) / sizeof(TVMFFIAny))
#define GLOBAL(name, ...) CALL(global(name), __VA_ARGS__)
#define METHOD(module, name, ...) CALL(GLOBAL("ffi.ModuleGetFunction", module, text(name), integer(1)).v_obj, __VA_ARGS__)
#define SHAPE(...) GLOBAL("ffi.Shape", __VA_ARGS__)

static void keep(DLManagedTensor *tensor) { (void)tensor; }

static TVMFFIAny tensor(void *data, DLDataType dtype, int64_t *shape, int ndim) {
    DLManagedTensor *managed = calloc(1, sizeof *managed);
    managed->dl_tensor = (DLTensor){.data = data, .device = {kDLCPU, 0}, .ndim = ndim, .dtype = dtype, .shape = shape};
    managed->deleter = keep;
    void *handle = NULL;
    if (TVMFFITensorFromDLPack(managed, 0, 0, &handle)) fail("a tensor");
    return object(handle);
}

static DLTensor *inside(TVMFFIAny any) { return (DLTensor *)((char *)any.v_obj + sizeof(TVMFFIObject)); }

static char *read_bytes(const char *path, long offset, size_t size) {
    FILE *file = fopen(path, "rb");
    char *room = calloc(size + 128, 1), *data = room + (64 - (uintptr_t)room % 64);
    if (!file || fseek(file, offset, SEEK_SET) || fread(data, 1, size, file) != size) fail(path);
    fclose(file);
    return data;
}

static TVMFFIAny parameters(const char *path) {
    static TVMFFIAny all[MOST];
    char line[4096], name[2048];
    int count = 0;
    FILE *list = fopen(path, "r");
    if (!list) fail(path);
    while (fgets(line, sizeof line, list)) {
        long offset;
        int code, bits, used, ndim = 0;
        int64_t *shape = calloc(8, sizeof *shape), size = 1;
        if (sscanf(line, "%2047s %ld %d %d%n", name, &offset, &code, &bits, &used) != 4) fail(line);
        for (char *at = line + used; *at && *at != '\n';) shape[ndim] = strtoll(at, &at, 10), size *= shape[ndim++];
        char *data = read_bytes(name, offset, size * bits / 8);
        all[count++] = tensor(data, (DLDataType){code, bits, 1}, shape, ndim);
    }
    fclose(list);
    return call("ffi.Array", global("ffi.Array"), all, count);
}

static void write_row(FILE *out, TVMFFIAny result) {
    TVMFFIAny logits = GLOBAL("ffi.ArrayGetItem", result, integer(0));
    DLTensor *t = inside(logits);
    int64_t vocab = t->shape[t->ndim - 1];
    fwrite((float *)((char *)t->data + t->byte_offset), sizeof(float), vocab, out);
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    if (!OPEN(argv[2])) return fprintf(stderr, "driver: %s cannot be opened\n", argv[2]), 1;
    TVMFFIAny library = GLOBAL("ffi.ModuleLoadFromFile", text(argv[1]));
    TVMFFIAny load = GLOBAL("ffi.ModuleGetFunction", library, text("vm_load_executable"), integer(1));
    TVMFFIAny module = call("vm_load_executable", load.v_obj, NULL, 0);
    METHOD(module, "vm_initialization", integer(1), integer(0), integer(2));
    TVMFFIAny weights = parameters(argv[3]);

    FILE *file = fopen(argv[4], "rb");
    static int32_t ids[MOST];
    int64_t count = file ? (int64_t)fread(ids, 4, MOST, file) : 0;
    if (count <= DECODED) fail(argv[4]);
    TVMFFIAny cache = METHOD(module, "create_tir_paged_kv_cache", SHAPE(integer(1)), SHAPE(integer(64)),
                             SHAPE(integer(64)), SHAPE(integer(16)), SHAPE(integer(0)));
    GLOBAL("vm.builtin.kv_state_add_sequence", cache, integer(0));
    FILE *out = fopen(argv[5], "wb");
    for (int64_t at = 0; at < count;) {
        int64_t *length = calloc(1, sizeof *length);
        *length = at ? 1 : count - DECODED;
        TVMFFIAny tokens = tensor(ids + at, (DLDataType){kDLInt, 32, 1}, length, 1);
        TVMFFIAny embedded = METHOD(module, "embed", tokens, weights);
        DLTensor *t = inside(embedded);
        DLDataType dtype = t->dtype;
        TVMFFIAny shape = SHAPE(integer(1), integer(*length), integer(t->shape[t->ndim - 1]));
        TVMFFIAny type = {.type_index = kTVMFFIDataType, .v_dtype = dtype};
        TVMFFIAny hidden = GLOBAL("runtime.TVMTensorCreateView", embedded, shape, type, integer(0));
        GLOBAL("vm.builtin.kv_state_begin_forward", cache, SHAPE(integer(0)), SHAPE(integer(*length)));
        write_row(out, at ? METHOD(module, "decode", hidden, cache, weights)
                          : METHOD(module, "prefill", hidden, cache, weights));
        GLOBAL("vm.builtin.kv_state_end_forward", cache);
        at += *length;
    }
    return fclose(out);
}

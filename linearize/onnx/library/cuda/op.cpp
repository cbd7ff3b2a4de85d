// The causal families of `schema.py` for onnxruntime's CUDA provider: one launch of a Triton kernel per node
// (`kernels/triton/rolling.py`), compiled ahead of time and read from the folder of this library. Needs no CUDA
// toolkit: the driver is found when the first node runs.
#include "../operator.h"

#include <dlfcn.h>

#include <fstream>
#include <iterator>
#include <map>
#include <mutex>

#ifndef PROVIDER
#define PROVIDER "CUDAExecutionProvider"
#endif

namespace linearize {
namespace {

struct Type {
  const char* name;
  ONNXTensorElementDataType onnx;
};
constexpr Type TYPES[] = {
    {"float", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
    {"bfloat16", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
};
constexpr const char* FAMILIES[] = {"AugmentedLinearAttention", "PlainLinearAttention"};

[[noreturn]] void fail(const std::string& why) { ORT_CXX_API_THROW("ai.linearize on CUDA: " + why, ORT_FAIL); }

// The few calls of CUDA's driver that a launch takes (cuda.h: CUresult is an int, handles are pointers).
struct Driver {
  int (*current)(void** context);
  int (*device)(int* device);
  int (*attribute)(int* value, int which, int device);
  int (*load)(void** module, const void* image);
  int (*find)(void** function, void* module, const char* name);
  int (*set)(void* function, int attribute, int value);
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                void* stream, void** arguments, void** extra);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) fail("libcuda.so.1 cannot be loaded");
    get(library, "cuCtxGetCurrent", current), get(library, "cuCtxGetDevice", device);
    get(library, "cuDeviceGetAttribute", attribute), get(library, "cuModuleLoadData", load);
    get(library, "cuModuleGetFunction", find), get(library, "cuFuncSetAttribute", set);
    get(library, "cuLaunchKernel", launch);
  }

  template <class Function>
  static void get(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) fail(std::string("libcuda.so.1 has no ") + name);
  }
};

void check(int result, const char* call) {
  if (result) fail(std::string(call) + " gave error " + std::to_string(result));
}

// What a kernel was compiled for. The index has a line for each (build.py).
struct Kind {
  std::string family, type;
  int64_t dim, value_dim, normalize, block;

  bool operator==(const Kind& other) const {
    return family == other.family && type == other.type && dim == other.dim && value_dim == other.value_dim &&
           normalize == other.normalize && block == other.block;
  }
};

struct Entry {
  Kind kind;
  int64_t arch, columns, warps, shared;
  std::string file;

  // Code for 8.0 runs on 8.6 and 8.9 too; later code is for its own processors alone.
  bool runs_on(int64_t device) const {
    return arch == device || (arch / 10 == 8 && device / 10 == 8 && arch < device);
  }
};

std::string folder() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&folder), &info);
  const std::string path = info.dli_fname;
  return path.substr(0, path.find_last_of('/') + 1);
}

class Kernels {
 public:
  struct Loaded {
    const Entry* entry;
    void* function;
  };

  static Kernels& instance() {
    static Kernels only;
    return only;
  }

  const Driver driver;

  // The kernel for the current device, loaded into its context.
  Loaded find(const Kind& kind) {
    void* context = nullptr;
    check(driver.current(&context), "cuCtxGetCurrent");
    int device = 0, major = 0, minor = 0;
    check(driver.device(&device), "cuCtxGetDevice");
    check(driver.attribute(&major, 75, device), "cuDeviceGetAttribute");
    check(driver.attribute(&minor, 76, device), "cuDeviceGetAttribute");
    for (const Entry& entry : entries)
      if (entry.kind == kind && entry.runs_on(10 * major + minor)) return {&entry, function(context, entry)};
    fail("no kernel was built for " + kind.family + " in " + kind.type + " with " + std::to_string(kind.dim) +
         " and " + std::to_string(kind.value_dim) + " features on sm_" + std::to_string(10 * major + minor));
  }

 private:
  std::vector<Entry> entries;
  std::map<std::pair<void*, const Entry*>, void*> functions;
  std::mutex lock;

  Kernels() {
    std::ifstream index(folder() + "index.txt");
    std::string sources;
    index >> sources;
    for (Entry e; index >> e.kind.family >> e.kind.type >> e.kind.dim >> e.kind.value_dim >> e.kind.normalize >>
                  e.kind.block >> e.arch >> e.columns >> e.warps >> e.shared >> e.file;)
      entries.push_back(e);
  }

  void* function(void* context, const Entry& entry) {
    std::lock_guard<std::mutex> held(lock);
    void*& found = functions[{context, &entry}];
    if (found) return found;
    std::ifstream file(folder() + entry.file, std::ios::binary);
    const std::string image{std::istreambuf_iterator<char>(file), {}};
    if (image.empty()) fail("cannot read " + entry.file);
    void *module = nullptr, *made = nullptr;
    check(driver.load(&module, image.data()), "cuModuleLoadData");
    check(driver.find(&made, module, "rolling_kernel"), "cuModuleGetFunction");
    const int MAX_DYNAMIC_SHARED = 8;
    check(driver.set(made, MAX_DYNAMIC_SHARED, static_cast<int>(entry.shared)), "cuFuncSetAttribute");
    return found = made;
  }
};

struct Kernel {
  Kind kind;
  int32_t group;

  Kernel(const OrtKernelInfo* info, const char* family, const char* type) {
    Ort::ConstKernelInfo attributes(info);
    const int64_t given = attributes.GetAttribute<int64_t>("group_size");
    require(given >= 1 && given < (1 << 20), "group_size");
    group = static_cast<int32_t>(given);
    kind = {family, type, 0, 0, attributes.GetAttribute<int64_t>("normalize"), 0};
  }

  void Compute(OrtKernelContext* handle) const {
    Ort::KernelContext context(handle);
    const void* in[INPUTS];
    Shape shape[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) {
      const Ort::ConstValue value = context.GetInput(i);
      in[i] = value.GetTensorRawData();
      shape[i] = value.GetTensorTypeAndShapeInfo().GetShape();
    }
    const auto [batch, heads, kv_heads, length, dim, value_dim, taps, rows] = sizes_of(shape, group);
    require((length + rows) * (dim + value_dim) < (int64_t{1} << 31), "a head of 2^31 numbers or more");

    void* out[OUTPUTS] = {
        context.GetOutput(OUT, Shape{batch, heads, length, value_dim}).GetTensorMutableRawData(),
        context.GetOutput(PRESENT_RECURRENT, shape[PAST_RECURRENT]).GetTensorMutableRawData(),
        context.GetOutput(PRESENT_WINDOW, shape[PAST_WINDOW]).GetTensorMutableRawData(),
    };
    if (batch == 0) return;
    if (out[PRESENT_WINDOW] == in[PAST_WINDOW] || out[PRESENT_RECURRENT] == in[PAST_RECURRENT])
      fail("a present state must not lie where the past one is");
    // The kernel is compiled for pointers of 16 bytes where it reads rows; onnxruntime's own have 256.
    for (const void* pointer : {in[QUERY], in[KEY], in[VALUE], in[PAST_RECURRENT], in[PAST_WINDOW],
                                static_cast<const void*>(out[OUT]), static_cast<const void*>(out[PRESENT_RECURRENT]),
                                static_cast<const void*>(out[PRESENT_WINDOW])})
      if (reinterpret_cast<uintptr_t>(pointer) % 16) fail("a tensor does not begin at a multiple of 16 bytes");

    Kind wanted = kind;
    wanted.dim = dim, wanted.value_dim = value_dim, wanted.block = length <= SHORT_BLOCK ? SHORT_BLOCK : LONG_BLOCK;
    Kernels& kernels = Kernels::instance();
    const auto [entry, function] = kernels.find(wanted);
    int32_t numbers[] = {int32_t(length), int32_t(kv_heads), int32_t(heads / kv_heads),
                         int32_t(rows),   group,             int32_t(taps)};
    void* scratch[] = {nullptr, nullptr};  // triton's kernels end in two pointers that these leave unused
    void* arguments[INPUTS + OUTPUTS + 6 + 2];
    void** next = arguments;
    for (const void*& pointer : in) *next++ = &pointer;
    for (void*& pointer : out) *next++ = &pointer;
    for (int32_t& number : numbers) *next++ = &number;
    for (void*& pointer : scratch) *next++ = &pointer;
    const int64_t programs = batch * kv_heads * ((value_dim + entry->columns - 1) / entry->columns);
    require(programs < (int64_t{1} << 31), "batch and heads");
    check(kernels.driver.launch(function, unsigned(programs), 1, 1, unsigned(32 * entry->warps), 1, 1,
                                unsigned(entry->shared), context.GetGPUComputeStream(), arguments, nullptr),
          "cuLaunchKernel");
    calls++;
  }
};

struct Op : CausalOp<Op, Kernel> {
  const char* type_name;

  Op(const char* family, Type type) : CausalOp(family, type.onnx), type_name(type.name) {}

  void* CreateKernel(const OrtApi&, const OrtKernelInfo* info) const { return new Kernel(info, family, type_name); }
  const char* GetExecutionProviderType() const { return PROVIDER; }
};

}  // namespace
}  // namespace linearize

using namespace linearize;

EXPORTED OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) return nullptr;  // too old: the bodies run
  Ort::InitApi(api);
  static const Ort::CustomOpDomain domain = [] {
    Ort::CustomOpDomain made("ai.linearize");
    for (const char* family : FAMILIES)
      for (Type type : TYPES) made.Add(new Op(family, type));
    return made;
  }();
  return api->AddCustomOpDomain(options, domain);
}

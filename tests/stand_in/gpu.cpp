// GPUs of host memory, for a build of PyTorch without CUDA: tensors on "cuda" lie in this process's memory, and each
// operation runs the processor's kernel on them in place. What a program asks of a GPU is real but for its speed: a
// tensor of the host beside one of a card is refused, pinned memory is told from other memory, and what is allocated
// is counted. Streams and events are there and do nothing, for all is done when it returns.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>

using namespace at;
using c10::DataPtr, c10::DeviceIndex, c10::DispatchKey, c10::DispatchKeySet, c10::IValue, c10::ScalarType, c10::Stream;
using Tensors = std::vector<Tensor>;

namespace {

std::atomic<int64_t> live{0}, peak{0};
std::atomic<int> current{0};

int gpus() {
  const char* number = std::getenv("STAND_IN_GPUS");
  return number ? std::atoi(number) : 0;
}

Device card() { return Device(kCUDA, current); }

struct Block {
  void* memory;
  size_t bytes;
};

struct CardMemory final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    auto* block = new Block{bytes ? std::malloc(bytes) : nullptr, bytes};
    int64_t now = live += bytes;
    for (int64_t seen = peak; now > seen && !peak.compare_exchange_weak(seen, now);) {
    }
    return {block->memory, block, &release, card()};
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    std::free(block->memory);
    live -= block->bytes;
    delete block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
CardMemory card_memory;

std::mutex pinning;
std::map<const char*, size_t> pinned_blocks;

struct PinnedMemory final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    auto* memory = static_cast<char*>(std::malloc(bytes ? bytes : 1));
    std::lock_guard<std::mutex> lock(pinning);
    pinned_blocks[memory] = bytes;
    return {memory, memory, &release, Device(kCPU)};
  }
  static void release(void* memory) {
    std::lock_guard<std::mutex> lock(pinning);
    pinned_blocks.erase(static_cast<char*>(memory));
    std::free(memory);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return gpus(); }
  Device exchangeDevice(Device) const override { return card(); }
  Device getDevice() const override { return card(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, card()); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, card()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, card()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

// ---------------------------------------------------------------- tensors

// The same memory as a tensor of the host, which keeps it only if it `holds` it.
Tensor on_host(const Tensor& tensor, bool holds = true) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  const auto& storage = tensor.storage();
  auto* memory = const_cast<void*>(storage.data());
  auto let_go = [](void* held) { delete static_cast<Storage*>(held); };
  auto pointer = holds ? DataPtr(memory, new Storage(storage), let_go, Device(kCPU)) : DataPtr(memory, Device(kCPU));
  Storage shared(Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), nullptr, /*resizable=*/false);
  auto key = DispatchKeySet(DispatchKey::CPU);
  auto made = at::detail::make_tensor<TensorImpl>(std::move(shared), key, tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

Tensor empty_on_card(IntArrayRef sizes, IntArrayRef strides, ScalarType type) {
  return at::detail::empty_strided_generic(sizes, strides, &card_memory, DispatchKeySet(DispatchKey::CUDA), type);
}

// A result of the processor's kernel, which is nobody else's, in memory of the card.
Tensor to_card(const Tensor& made) {
  if (!made.defined() || made.is_cuda()) return made;
  auto result = empty_on_card(made.sizes(), made.strides(), made.scalar_type());
  on_host(result).copy_(made);
  return result;
}

void resize_storage(const Tensor& tensor, int64_t bytes) {
  auto storage = tensor.storage();
  auto memory = card_memory.allocate(bytes);
  if (auto kept = std::min<size_t>(bytes, storage.nbytes())) memcpy(memory.get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(memory));
  storage.set_nbytes(bytes);
}

const Tensor& card_resize(const Tensor& self, IntArrayRef sizes, std::optional<c10::MemoryFormat>) {
  auto bytes = (self.storage_offset() + c10::multiply_integers(sizes)) * self.dtype().itemsize();
  if (bytes > self.storage().nbytes()) resize_storage(self, bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor card_empty(
    IntArrayRef sizes, std::optional<ScalarType> type, std::optional<Layout>, std::optional<Device>,
    std::optional<bool> pinned, std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "only memory of the host is pinned");
  auto key = DispatchKeySet(DispatchKey::CUDA);
  return at::detail::empty_generic(sizes, &card_memory, key, c10::dtype_or_default(type), format);
}

Tensor card_empty_strided(
    IntArrayRef sizes, IntArrayRef strides, std::optional<ScalarType> type, std::optional<Layout>,
    std::optional<Device>, std::optional<bool>) {
  return empty_on_card(sizes, strides, c10::dtype_or_default(type));
}

Tensor& card_copy(Tensor& self, const Tensor& source, bool) {
  on_host(self).copy_(on_host(source));
  return self;
}

// A view of self that is laid out as `like`.
Tensor view_as(const Tensor& self, const Tensor& like) {
  auto view = at::detail::make_tensor<TensorImpl>(
      TensorImpl::VIEW, Storage(self.storage()), self.key_set(), like.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return view;
}

Tensor card_as_strided(const Tensor& self, IntArrayRef sizes, IntArrayRef strides, std::optional<int64_t> offset) {
  return view_as(self, on_host(self).as_strided(sizes, strides, offset));
}
Tensor card_view(const Tensor& self, IntArrayRef sizes) { return view_as(self, on_host(self).view(sizes)); }
Tensor card_view_dtype(const Tensor& self, ScalarType type) { return view_as(self, on_host(self).view(type)); }
Tensor card_reshape_alias(const Tensor& self, IntArrayRef sizes, IntArrayRef strides) {
  return view_as(self, on_host(self).as_strided(sizes, strides));
}
Tensor card_unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return view_as(self, on_host(self).unfold(dimension, size, step));
}

Tensor& card_set_storage(Tensor& self, Storage source, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return self;
}
Tensor& card_set_tensor(Tensor& self, const Tensor& source) {
  return card_set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// ---------------------------------------------------------------- every other operation

// Indices may be on the host.
bool takes_both(const std::string& name) {
  return name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0;
}

void on_processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const auto begin = stack->size() - count;
  const std::vector<IValue> given(stack->begin() + begin, stack->end());
  std::vector<std::pair<size_t, Tensor>> sized;  // results that are given empty, to be resized
  bool here = false, host = false;
  auto taken = [&](const Tensor& tensor) {
    if (tensor.defined()) (tensor.is_cuda() ? here : host) |= tensor.is_cuda() || (tensor.dim() > 0 && tensor.numel());
    return on_host(tensor);
  };
  for (size_t i = 0; i < count; i++) {
    const auto& argument = schema.arguments()[i];
    auto& slot = (*stack)[begin + i];
    if (given[i].isTensor()) {
      auto tensor = given[i].toTensor();
      slot = taken(tensor);
      if (argument.is_out() && tensor.defined() && tensor.is_cuda() && tensor.numel() == 0) {
        sized.emplace_back(i, at::empty({0}, at::device(kCPU).dtype(tensor.dtype())));
        slot = sized.back().second;
      }
    } else if (given[i].isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : given[i].toTensorList()) list.push_back(taken(tensor));
      slot = list;
    } else if (given[i].isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> tensor : given[i].toOptionalTensorList()) {
        list.push_back(tensor ? std::optional<Tensor>(taken(*tensor)) : std::nullopt);
      }
      slot = list;
    } else if (given[i].isDevice()) {
      slot = Device(kCPU);
    } else if (argument.name() == "pin_memory") {
      slot = IValue();
    }
  }
  TORCH_CHECK(
      !(here && host) || takes_both(schema.name()), "Expected all tensors to be on the same device: ", schema.name());
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  for (auto& [i, made] : sized) {
    auto result = given[i].toTensor();
    card_resize(result, made.sizes(), std::nullopt);
    result.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides());
    on_host(result).copy_(made);
  }
  const auto first = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); i++) {
    const auto* alias = schema.returns()[i].alias_info();
    auto& result = (*stack)[first + i];
    if (alias && alias->isWrite()) {
      for (size_t j = 0; j < count; j++) {
        const auto* other = schema.arguments()[j].alias_info();
        if (other && other->isWrite() && other->beforeSets() == alias->beforeSets()) result = given[j];
      }
    } else if (result.isTensor()) {
      result = to_card(result.toTensor());
    } else if (result.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : result.toTensorList()) list.push_back(to_card(tensor));
      result = list;
    }
  }
}

// ---------------------------------------------------------------- NCCL, over gloo

// gloo's threads let go of tensors some time after they are done, so they hold none: each call waits for its end.
Tensors all_on_host(const Tensors& tensors) {
  Tensors found;
  for (const auto& tensor : tensors) {
    TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), "NCCL takes contiguous tensors of a GPU");
    found.push_back(on_host(tensor, false));
  }
  return found;
}

struct Collectives final : c10d::Backend {
  using Done = c10::intrusive_ptr<c10d::Work>;
  c10::intrusive_ptr<c10d::Backend> gloo;
  explicit Collectives(c10::intrusive_ptr<c10d::Backend> other)
      : c10d::Backend(other->getRank(), other->getSize()), gloo(std::move(other)) {}
  const std::string getBackendName() const override { return "stand_in"; }
  void setTimeout(std::chrono::milliseconds) override {}
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }

  static Done waited(Done work) {
    work->wait();
    return work;
  }
  // gloo has no mean.
  template <typename Options, typename Reduce>
  Done reduced(const Options& options, Tensors results, Reduce reduce) {
    auto plain = options;
    const bool mean = options.reduceOp == c10d::ReduceOp::AVG;
    if (mean) plain.reduceOp = c10d::ReduceOp::SUM;
    auto work = waited(reduce(plain));
    for (auto& result : results) {
      if (mean) result.div_(getSize());
    }
    return work;
  }
  Done broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto host = all_on_host(tensors);
    return waited(gloo->broadcast(host, options));
  }
  Done allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto host = all_on_host(tensors);
    return reduced(options, host, [&](auto& plain) { return gloo->allreduce(host, plain); });
  }
  Done allgather(std::vector<Tensors>& results, Tensors& tensors, const c10d::AllgatherOptions& options) override {
    std::vector<Tensors> found;
    for (auto& each : results) found.push_back(all_on_host(each));
    auto host = all_on_host(tensors);
    return waited(gloo->allgather(found, host, options));
  }
  Done _allgather_base(Tensor& result, Tensor& tensor, const c10d::AllgatherOptions& options) override {
    auto both = all_on_host({result, tensor});
    return waited(gloo->_allgather_base(both[0], both[1], options));
  }
  Done _reduce_scatter_base(Tensor& result, Tensor& tensor, const c10d::ReduceScatterOptions& options) override {
    auto both = all_on_host({result, tensor});
    return reduced(options, {both[0]}, [&](auto& plain) {
      return gloo->_reduce_scatter_base(both[0], both[1], plain);
    });
  }
  Done alltoall_base(
      Tensor& result, Tensor& tensor, std::vector<int64_t>& outputs, std::vector<int64_t>& inputs,
      const c10d::AllToAllOptions& options) override {
    auto both = all_on_host({result, tensor});
    return waited(gloo->alltoall_base(both[0], both[1], outputs, inputs, options));
  }
  Done send(Tensors& tensors, int to, int tag) override {
    auto host = Tensors{on_host(tensors.at(0))};
    return gloo->send(host, to, tag);
  }
  Done recv(Tensors& tensors, int from, int tag) override {
    auto host = Tensors{on_host(tensors.at(0))};
    return gloo->recv(host, from, tag);
  }
  Done barrier(const c10d::BarrierOptions& options) override {
    auto plain = options;
    plain.device_ids.clear();
    return gloo->barrier(plain);
  }
};

struct NoTimer final : c10d::Timer {
  explicit NoTimer(Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};

}  // namespace

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return gpus(); }
  DeviceIndex deviceCount() const override { return gpus(); }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return current; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return current; }
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void* pointer) const override {
    std::lock_guard<std::mutex> lock(pinning);
    auto* at = static_cast<const char*>(pointer);
    auto after = pinned_blocks.upper_bound(at);
    return after != pinned_blocks.begin() && at < std::prev(after)->first + std::prev(after)->second;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &card_memory; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  Device getDeviceFromPtr(void*) const override { return card(); }
};

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &card_memory)
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, ::NoTimer)
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_processor>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(card_empty));
  library.impl("empty_strided", TORCH_FN(card_empty_strided));
  library.impl("copy_", TORCH_FN(card_copy));
  library.impl("as_strided", TORCH_FN(card_as_strided));
  library.impl("view", TORCH_FN(card_view));
  library.impl("view.dtype", TORCH_FN(card_view_dtype));
  library.impl("_reshape_alias", TORCH_FN(card_reshape_alias));
  library.impl("unfold", TORCH_FN(card_unfold));
  library.impl("resize_", TORCH_FN(card_resize));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(card_set_storage));
  library.impl("set_.source_Tensor", TORCH_FN(card_set_tensor));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("live", [] { return live.load(); });
  module.def("peak", [] { return peak.load(); });
  module.def("reset_peak", [] { peak = live.load(); });
  module.def("set_device", [](int index) { current = index; });
  module.def("on_host", [](const Tensor& tensor) { return on_host(tensor); });
  module.def("resize_storage", &resize_storage);
  module.def("collectives", [](c10::intrusive_ptr<c10d::Backend> gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Collectives>(std::move(gloo));
  });
}

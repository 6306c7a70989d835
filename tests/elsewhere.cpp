// A device that is not the CPU, for machines without one: memory of its own name, in which the CPU computes.
// An operation that is given tensors of both raises, as it does on a GPU.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

using at::Tensor;
constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device HERE(KIND, 0);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? c10::alloc_cpu(n) : nullptr;
    return {p, p, &c10::free_cpu, HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory)

struct Guard final : c10::impl::NoOpDeviceGuardImpl<KIND> {
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Random final : at::CPUGeneratorImpl {
  Random() : at::CPUGeneratorImpl(c10::default_rng_seed_val) { device_ = HERE; }
};

at::Generator& random_here() {
  static at::Generator random = at::make_generator<Random>();
  return random;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return random_here(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Random>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    auto data = memory.allocate(n);
    if (storage.nbytes() && n) std::memcpy(data.get(), storage.data(), std::min(n, storage.nbytes()));
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(n);
  }
};

Tensor on_cpu(const Tensor& t) {
  if (!t.defined() || t.is_cpu()) return t;
  auto options = t.options().device(c10::kCPU).requires_grad(false);
  auto shown = at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options);
  if (t.is_conj()) shown = shown.conj();
  if (t.is_neg()) shown = at::_neg_view(shown);
  return shown;
}

Tensor here(const Tensor& t) { return t.defined() ? t.to(HERE) : t; }

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& t, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t bytes = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  if (t.storage().nbytes() < bytes) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(t.storage(), bytes);
  return t;
}

at::Scalar number(const Tensor& t) { return on_cpu(t).item(); }

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  auto bias = b.has_value() ? std::optional<Tensor>(on_cpu(*b)) : b;
  return here(at::convolution(on_cpu(x), on_cpu(w), bias, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  std::vector<int64_t> bias{g.size(1)};
  auto [gx, gw, gb] = at::convolution_backward(
      on_cpu(g), on_cpu(x), on_cpu(w), at::OptionalIntArrayRef(bias), stride, padding, dilation, transposed,
      output_padding, groups, mask);
  return {here(gx), here(gw), here(gb)};
}

int64_t attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                  std::optional<double>, bool) {
  return 0;  // by matrix products
}

// The cells of recurrent layers, which torch takes to be one operation each on what is no CPU.
using Pair = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Maybe = std::optional<Tensor>;

Tensor or_zeros(const Maybe& t, const Tensor& like) { return t.has_value() && t->defined() ? *t : at::zeros_like(like); }

Tensor with(const Tensor& gates, const Maybe& bias) {
  return bias.has_value() && bias->defined() ? gates + *bias : gates;
}

Three lstm_cell(const Tensor& of_x, const Tensor& of_h, const Tensor& c, const Maybe& bias, const Maybe& more) {
  auto gates = (with(of_x, bias) + with(of_h, more)).chunk(4, 1);
  auto i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
  auto after = f * c + i * g;
  return {o * after.tanh(), after, at::cat({i, f, g, o}, 1)};
}

Three lstm_cell_backward(const Maybe& of_h, const Maybe& of_c, const Tensor& c, const Tensor& after,
                         const Tensor& workspace, bool has_bias) {
  auto gates = workspace.chunk(4, 1);
  auto i = gates[0], f = gates[1], g = gates[2], o = gates[3], t = after.tanh();
  auto gh = or_zeros(of_h, c), gc = or_zeros(of_c, c) + gh * o * (1 - t * t);
  auto grad = at::cat({gc * g * i * (1 - i), gc * c * f * (1 - f), gc * i * (1 - g * g), gh * t * o * (1 - o)}, 1);
  return {grad, gc * f, has_bias ? grad.sum(0) : Tensor()};
}

Pair gru_cell(const Tensor& of_x, const Tensor& of_h, const Tensor& h, const Maybe& bias, const Maybe& more) {
  auto x = with(of_x, bias).chunk(3, 1), y = with(of_h, more).chunk(3, 1);
  auto r = (x[0] + y[0]).sigmoid(), z = (x[1] + y[1]).sigmoid(), n = (x[2] + r * y[2]).tanh();
  return {n + z * (h - n), at::cat({r, z, n, h, y[2]}, 1)};
}

Five gru_cell_backward(const Tensor& g, const Tensor& workspace, bool has_bias) {
  auto kept = workspace.chunk(5, 1);
  auto r = kept[0], z = kept[1], n = kept[2], h = kept[3], y = kept[4];
  auto gz = g * (h - n) * z * (1 - z), gn = g * (1 - z) * (1 - n * n), gr = gn * y * r * (1 - r);
  auto of_x = at::cat({gr, gz, gn}, 1), of_h = at::cat({gr, gz, gn * r}, 1);
  return {of_x, of_h, g * z, has_bias ? of_x.sum(0) : Tensor(), has_bias ? of_h.sum(0) : Tensor()};
}

bool may_mix(const std::string& name) {  // indices may be on the CPU
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
}

void elsewhere(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool own = false, others = false;
  auto see = [&](const Tensor& t) {
    if (!t.defined()) return;
    if (t.is_cpu()) others |= t.dim() > 0; else own = true;
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList()) for (const Tensor& t : value.toTensorList()) see(t);
    if (value.isOptionalTensorList())
      for (const std::optional<Tensor> t : value.toOptionalTensorList()) if (t.has_value()) see(*t);
  }
  TORCH_CHECK(!(own && others) || may_mix(op.schema().name()), "Expected all tensors to be on the same device, but ",
              op.schema().name(), " is given some of the CPU.");
  std::vector<std::pair<at::Generator, at::Generator>> drawn;  // by generators of the CPU that stand for those of here
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (!value.isGenerator()) continue;
    TORCH_CHECK(!own || value.toGenerator().device() == HERE, "Expected a generator of '", HERE, "' but found 'cpu'.");
    if (value.toGenerator().device().is_cpu()) continue;
    auto random = at::make_generator<at::CPUGeneratorImpl>();
    random.set_state(value.toGenerator().get_state());
    drawn.emplace_back(value.toGenerator(), random);
    value = random;
  }
  auto random = at::detail::getDefaultCPUGenerator();
  auto before = op.hasTag(at::Tag::nondeterministic_seeded) ? random.get_state() : Tensor();
  if (before.defined()) random.set_state(random_here().get_state());
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  if (before.defined()) {
    random_here().set_state(random.get_state());
    random.set_state(before);
  }
  for (auto& [from, random] : drawn) from.set_state(random.get_state());
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&elsewhere>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("_local_scalar_dense", number);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_fused_sdp_choice", attention);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(group_norm, fp32)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
}

// Copying is what makes conjugates and negatives real ones.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

// Called by Python.
extern "C" void random_state(void* bytes) {
  auto state = random_here().get_state();
  std::memcpy(bytes, state.data_ptr(), state.nbytes());
}

extern "C" void set_random_state(const void* bytes) {
  auto state = random_here().get_state();
  std::memcpy(state.data_ptr(), bytes, state.nbytes());
  random_here().set_state(state);
}

extern "C" void begin() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

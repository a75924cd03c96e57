#include "generator.h"

#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>

#include <array>
#include <cstring>
#include <mutex>

namespace sim {
namespace {

uint64_t random_seed() { return c10::detail::getNonDeterministicRandom() >> 12; }

// Spreads the bits (splitmix64): neighbouring seeds and offsets must give unlike streams.
uint64_t mixed(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
  return bits ^ (bits >> 31);
}

// A seed and an offset, 16 bytes, as CUDA's generator has. Each kernel that draws moves the offset on. The numbers come
// from a Mersenne Twister that both seed, so they are neither CUDA's nor those of the CPU's generator.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(c10::DeviceIndex device)
      : c10::GeneratorImpl(c10::Device(kDeviceType, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  void set_current_seed(uint64_t value) override {
    seed_ = value;
    offset_ = 0;
  }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(random_seed());
    return seed_;
  }
  void set_offset(uint64_t value) override { offset_ = value; }
  uint64_t get_offset() const override { return offset_; }

  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(
        state.device().is_cpu() && state.dtype() == caffe2::TypeMeta::Make<uint8_t>() && state.is_contiguous(),
        "RNG state must be a torch.ByteTensor");
    TORCH_CHECK(state.numel() == 2 * sizeof(uint64_t), "RNG state is wrong size");
    auto bytes = static_cast<const char*>(state.data());
    std::memcpy(&seed_, bytes, sizeof seed_);
    std::memcpy(&offset_, bytes + sizeof seed_, sizeof offset_);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::detail::empty_cpu({2 * sizeof(uint64_t)}, at::kByte);
    auto bytes = static_cast<char*>(state.mutable_data_ptr());
    std::memcpy(bytes, &seed_, sizeof seed_);
    std::memcpy(bytes + sizeof seed_, &offset_, sizeof offset_);
    return state.getIntrusivePtr();
  }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->seed_ = seed_;
    copy->offset_ = offset_;
    return copy;
  }

  at::Generator draw(int64_t numel) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto generator = at::detail::createCPUGenerator(mixed(seed_ * 0x9E3779B97F4A7C15ull + mixed(offset_ + 1)));
    // A multiple of four that grows with the number of elements, as on CUDA, where a kernel for none draws none.
    if (numel > 0) offset_ += 4 * ((numel + 1023) / 1024 + 1);
    return generator;
  }

 private:
  uint64_t seed_ = random_seed();
  uint64_t offset_ = 0;
};

}  // namespace

at::Generator new_generator(c10::DeviceIndex device) {
  return at::Generator(c10::make_intrusive<Generator>(device < 0 ? current_device() : device));
}

at::Generator& default_generator(c10::DeviceIndex device) {
  static auto* all = new std::array<at::Generator, kNumDevices>{new_generator(0), new_generator(1)};
  return all->at(device < 0 ? current_device() : device);
}

at::Generator generator_for_kernel(const at::Generator& generator, int64_t numel) {
  TORCH_CHECK(
      generator.device().type() == kDeviceType, "Expected a 'sim' device type for generator but found '",
      generator.device().type(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->draw(numel);
}

}  // namespace sim

// Types that run: half and bfloat as classes with MSL's conversions, small vectors, and
// threadgroup memory from the runtime. Address spaces are empty words.
#pragma once
#define device
#define constant
#define threadgroup
#define thread

template <typename T> struct msl_element { static constexpr unsigned long bytes = sizeof(T); };
template <typename T, unsigned long N> struct msl_element<T[N]> : msl_element<T> {};

// The static variable's address names the declaration, in each instantiation another one.
#define MSL_THREADGROUP(name, dims, ...)                                                     \
  static const char msl_key_##name = 0;                                                      \
  typedef __VA_ARGS__ msl_type_##name dims;                                                  \
  msl_type_##name& name = *(msl_type_##name*)msl_threadgroup_memory(                         \
      &msl_key_##name, sizeof(msl_type_##name), msl_element<msl_type_##name>::bytes, #name)

template <typename To, typename From> METAL_FUNC To msl_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "of different size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Numbers of 16 bits

// All round to nearest, ties to even.
METAL_FUNC uint16_t msl_half_from_float(float f) {
  uint32_t bits = msl_bits<uint32_t>(f), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and more: infinity
  if (bits < 0x38800000) {                       // subnormal: adding 0.5 aligns and rounds
    float aligned = msl_bits<float>(bits) + 0.5f;
    return sign | (msl_bits<uint32_t>(aligned) - 0x3f000000);
  }
  return sign | (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13;
}
METAL_FUNC float msl_float_from_half(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return msl_bits<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent) return msl_bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
  float subnormal = fraction * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}
METAL_FUNC uint16_t msl_bfloat_from_float(float f) {
  uint32_t bits = msl_bits<uint32_t>(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 64;  // NaN stays NaN
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct half {
  uint16_t bits;
  half() = default;
  METAL_FUNC half(float f) : bits(msl_half_from_float(f)) {}
  METAL_FUNC half(double f) : half(float(f)) {}
  METAL_FUNC half(int i) : half(float(i)) {}
  METAL_FUNC half(uint i) : half(float(i)) {}
  METAL_FUNC operator float() const { return msl_float_from_half(bits); }
};
// MSL 3.1: bfloat becomes float by itself; nothing becomes bfloat by itself.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  METAL_FUNC explicit bfloat(float f) : bits(msl_bfloat_from_float(f)) {}
  METAL_FUNC explicit bfloat(double f) : bfloat(float(f)) {}
  METAL_FUNC explicit bfloat(int i) : bfloat(float(i)) {}
  METAL_FUNC explicit bfloat(uint i) : bfloat(float(i)) {}
  METAL_FUNC explicit bfloat(half h) : bfloat(float(h)) {}
  METAL_FUNC operator float() const { return msl_bits<float>(uint32_t(bits) << 16); }
};

// H op H and H op int are H, H op float is float. Comparisons need nothing: both become float.
#define MSL_MIXED(H, op, T, R)                                            \
  METAL_FUNC R operator op(H a, T b) { return R(float(a) op float(b)); } \
  METAL_FUNC R operator op(T a, H b) { return R(float(a) op float(b)); }
#define MSL_OPERATOR(H, op)                                               \
  METAL_FUNC H operator op(H a, H b) { return H(float(a) op float(b)); } \
  METAL_FUNC H& operator op##=(H& a, H b) { return a = a op b; }          \
  MSL_MIXED(H, op, float, float)                                          \
  MSL_MIXED(H, op, int, H)                                                \
  MSL_MIXED(H, op, uint, H)
#define MSL_OPERATORS(H) \
  MSL_OPERATOR(H, +)     \
  MSL_OPERATOR(H, -)     \
  MSL_OPERATOR(H, *)     \
  MSL_OPERATOR(H, /)     \
  METAL_FUNC H operator-(H a) { return H(-float(a)); }
MSL_OPERATORS(half)
MSL_OPERATORS(bfloat)

// Vectors, aligned as on a GPU: UBSan reports a misaligned float4

namespace metal {
template <typename T, int N> struct vec;
template <typename T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  METAL_FUNC explicit vec(T a) : x(a), y(a) {}
  METAL_FUNC vec(T a, T b) : x(a), y(b) {}
  template <typename U> METAL_FUNC explicit vec(vec<U, 2> v) : x(T(v.x)), y(T(v.y)) {}
  METAL_FUNC T& operator[](int i) { return (&x)[i]; }
  METAL_FUNC const T& operator[](int i) const { return (&x)[i]; }
};
template <typename T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  METAL_FUNC explicit vec(T a) : x(a), y(a), z(a) {}
  METAL_FUNC vec(T a, T b, T c) : x(a), y(b), z(c) {}
  template <typename U> METAL_FUNC explicit vec(vec<U, 3> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)) {}
  METAL_FUNC T& operator[](int i) { return (&x)[i]; }
  METAL_FUNC const T& operator[](int i) const { return (&x)[i]; }
};
template <typename T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  METAL_FUNC explicit vec(T a) : x(a), y(a), z(a), w(a) {}
  METAL_FUNC vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  template <typename U> METAL_FUNC explicit vec(vec<U, 4> v)
      : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  METAL_FUNC T& operator[](int i) { return (&x)[i]; }
  METAL_FUNC const T& operator[](int i) const { return (&x)[i]; }
};

#define MSL_VECTOR_OPERATOR(op)                                                          \
  template <typename T, int N> METAL_FUNC vec<T, N> operator op(vec<T, N> a, vec<T, N> b) { \
    for (int i = 0; i < N; i++) a[i] = a[i] op b[i];                                     \
    return a;                                                                            \
  }                                                                                      \
  template <typename T, int N> METAL_FUNC vec<T, N> operator op(vec<T, N> a, T b) {      \
    return a op vec<T, N>(b);                                                            \
  }                                                                                      \
  template <typename T, int N> METAL_FUNC vec<T, N> operator op(T a, vec<T, N> b) {      \
    return vec<T, N>(a) op b;                                                            \
  }                                                                                      \
  template <typename T, int N, typename U>                                               \
  METAL_FUNC vec<T, N>& operator op##=(vec<T, N>& a, U b) {                              \
    return a = a op b;                                                                   \
  }
MSL_VECTOR_OPERATOR(+)
MSL_VECTOR_OPERATOR(-)
MSL_VECTOR_OPERATOR(*)
MSL_VECTOR_OPERATOR(/)
template <typename T, int N> METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum = sum + a[i] * b[i];
  return sum;
}
}  // namespace metal

#define MSL_VECTORS(T)            \
  typedef metal::vec<T, 2> T##2;  \
  typedef metal::vec<T, 3> T##3;  \
  typedef metal::vec<T, 4> T##4;
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)

// For the glue that calls the kernel.
METAL_FUNC uint3 msl_attribute(MslTriple v) { return uint3(v.x, v.y, v.z); }
METAL_FUNC uint msl_attribute(uint v) { return v; }

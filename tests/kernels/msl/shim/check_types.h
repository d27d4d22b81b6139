// Types for clang's front end alone: real address spaces, built-in half, bfloat and vectors.
// Nothing here runs.
#pragma once
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define MSL_THREADGROUP(name, dims, ...) static threadgroup __VA_ARGS__ name dims

typedef _Float16 half;
typedef __bf16 bfloat;

#define MSL_VECTORS(T)                               \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)

// float4(a, b, c, d): C++ has no such cast for clang's vectors. The macros apply before a "(" only.
template <typename V, typename... A> V msl_vector(A...);
#define float2(...) msl_vector<float2>(__VA_ARGS__)
#define float3(...) msl_vector<float3>(__VA_ARGS__)
#define float4(...) msl_vector<float4>(__VA_ARGS__)
#define half2(...) msl_vector<half2>(__VA_ARGS__)
#define half4(...) msl_vector<half4>(__VA_ARGS__)
#define int2(...) msl_vector<int2>(__VA_ARGS__)
#define int4(...) msl_vector<int4>(__VA_ARGS__)
#define uint2(...) msl_vector<uint2>(__VA_ARGS__)
#define uint3(...) msl_vector<uint3>(__VA_ARGS__)
#define uint4(...) msl_vector<uint4>(__VA_ARGS__)

namespace metal {
template <typename T, int N> using vec = T __attribute__((ext_vector_type(N)));
float dot(float2, float2);
float dot(float3, float3);
float dot(float4, float4);
half dot(half2, half2);
half dot(half4, half4);
}  // namespace metal

template <typename To, typename From> METAL_FUNC To msl_bits(From from) {
  return __builtin_bit_cast(To, from);
}

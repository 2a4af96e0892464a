// The row loop in plain C++, for processors without AVX2 and as the twin that the others are compared with.
#include "merge_rows.h"

namespace fastlora {
namespace {

struct Scalar {
    struct F {
        float lane[LANES];
    };
    struct D {
        double lane[LANES];
    };
    template <class S>
    struct Bits {
        typename S::Store lane[LANES];
    };

    template <class Function>
    static F each(Function function) {
        F out;
        for (int i = 0; i < LANES; ++i) out.lane[i] = function(i);
        return out;
    }
    template <class Function>
    static uint32_t mask(Function function) {
        uint32_t out = 0;
        for (int i = 0; i < LANES; ++i) out |= uint32_t(bool(function(i))) << i;
        return out;
    }

    static F zero() { return {}; }
    static D zero_double() { return {}; }
    static F set1(float value) {
        return each([&](int) { return value; });
    }
    static F load(const float* source) {
        return each([&](int i) { return source[i]; });
    }
    static F fma(const F& a, const F& b, const F& c) {
        return each([&](int i) { return multiply_add(a.lane[i], b.lane[i], c.lane[i]); });
    }
    static F add(const F& a, const F& b) {
        return each([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static F sub(const F& a, const F& b) {
        return each([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    static F mul(const F& a, const F& b) {
        return each([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static F abs(const F& a) {
        return each([&](int i) { return fabsf(a.lane[i]); });
    }
    static F zero_if_nan(const F& a) {
        return each([&](int i) { return a.lane[i] == a.lane[i] ? a.lane[i] : 0.0f; });
    }
    static F nearest(const F& a) {
        return each([&](int i) { return nearbyintf(a.lane[i]); });
    }
    template <class S>
    static F ulp(S, const F& weight) {
        return each([&](int i) { return ulp_of<S>(weight.lane[i]); });
    }
    template <class S>
    static F per_ulp(S, const F& weight) {
        return each([&](int i) { return per_ulp_of<S>(weight.lane[i]); });
    }
    static F load_int8(const int8_t* source) {
        return each([&](int i) { return float(source[i]); });
    }
    static void store_int8(int8_t* target, const F& units) {
        for (int i = 0; i < LANES; ++i) target[i] = int8_t(units.lane[i]);
    }
    static F min(const F& a, const F& b) {
        return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static F max(const F& a, const F& b) {
        return each([&](int i) { return larger(a.lane[i], b.lane[i]); });
    }
    static F ratio(const F& a, const F& b) {
        return each([&](int i) { return fabsf(a.lane[i]) / fabsf(b.lane[i]); });
    }
    static F unless_zero(const F& test, const F& a, const F& b) {
        return each([&](int i) { return test.lane[i] != 0 ? a.lane[i] : b.lane[i]; });
    }
    static uint32_t nonzero(const F& a) {
        return mask([&](int i) { return a.lane[i] != 0; });
    }
    static uint32_t equal(const F& a, const F& b) {
        return mask([&](int i) { return a.lane[i] == b.lane[i]; });
    }
    static uint32_t greater(const F& a, const F& b) {
        return mask([&](int i) { return a.lane[i] > b.lane[i]; });
    }
    static uint32_t not_finite(const F& a) {
        return mask([&](int i) { return !is_finite(a.lane[i]); });
    }
    static void square_into(const F& a, D& sum) {
        for (int i = 0; i < LANES; ++i) sum.lane[i] += double(a.lane[i]) * double(a.lane[i]);
    }
    static void add_into(const F& a, D& sum) {
        for (int i = 0; i < LANES; ++i) sum.lane[i] += double(a.lane[i]);
    }
    static double sum(const D& sum) {
        double total = 0;
        for (double lane : sum.lane) total += lane;
        return total;
    }

    template <class S>
    static Bits<S> bits(S, const typename S::Store* source) {
        Bits<S> out;
        memcpy(out.lane, source, sizeof out.lane);
        return out;
    }
    template <class S>
    static F widen(S, const Bits<S>& bits) {
        return each([&](int i) { return fastlora::widen(S{}, bits.lane[i]); });
    }
    template <class S>
    static Bits<S> round(S, const F& a) {
        Bits<S> out;
        for (int i = 0; i < LANES; ++i) out.lane[i] = fastlora::round_to(S{}, a.lane[i]);
        return out;
    }
    template <class S>
    static void store(S, typename S::Store* target, const Bits<S>& bits) {
        memcpy(target, bits.lane, sizeof bits.lane);
    }
    static void store(F32, float* target, const F& a) { memcpy(target, a.lane, sizeof a.lane); }
};

}  // namespace

const Isa scalar_isa = isa_of<Scalar>("scalar");

}  // namespace fastlora

// Checks at the border of the extension: what was given, what is accepted. Python checks first and in the user's words;
// these stand between a caller of the raw functions and a crash. std::invalid_argument becomes ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

#define CHECK_ARG(condition, message)                      \
    do {                                                   \
        if (!(condition)) {                                \
            std::ostringstream text;                       \
            text << message;                               \
            throw std::invalid_argument(text.str());       \
        }                                                  \
    } while (false)

#define CHECK_CUDA(call)                                                                        \
    do {                                                                                        \
        const cudaError_t status = (call);                                                      \
        if (status != cudaSuccess) {                                                            \
            std::ostringstream text;                                                            \
            text << #call << " failed: " << cudaGetErrorString(status);                         \
            throw std::runtime_error(text.str());                                               \
        }                                                                                       \
    } while (false)

#define CHECK_LAUNCH() CHECK_CUDA(cudaGetLastError())

// The arguments of attention over the slots' keys: pointers to contiguous memory.

#pragma once

#include "rows.hpp"

// The inputs that all blocks of a forward pass share.
struct Pass {
    int64_t rows, queries;              // queries: new tokens a row
    int64_t length;                     // columns the mask covers
    const void *cosines, *sines;        // [rows, queries, size]
    const int64_t *slots, *places;      // [rows], and [rows, queries]: the columns that keys are written to
    const uint8_t* mask;                // [rows, queries, length]
};

struct Attention : Pass {
    int64_t heads, groups, size;        // query heads, key heads, numbers a head
    int64_t columns;                    // of the cache, for each slot and head
    float scaling, epsilon;             // of the norms over single heads
    const void* joined;                 // [rows, queries, (heads + 2 groups) size]: queries, keys and values
    const void *query_norm, *key_norm;  // [size], or null
    void *keys, *cached;                // [slots, groups, columns, size]: the cache's keys and values
    void* out;                          // [rows, queries, heads size]

    template <typename T> const T* new_head(int64_t row, int64_t query, int64_t head) const {
        return (const T*)joined + ((row * queries + query) * (heads + 2 * groups) + head) * size;
    }
    template <typename T> T* cache(void* states, int64_t row, int64_t group) const {
        return (T*)states + (slots[row] * groups + group) * columns * size;
    }

    // Rotary embedding of a new head, after its norm if it has one.
    template <typename T> void rotate_head(const T* head, const void* norm, int64_t row, int64_t query, T* to) const {
        const int64_t token = (row * queries + query) * size;
        rotate(head, (const T*)norm, epsilon, (const T*)cosines + token, (const T*)sines + token, to, size);
    }

    // Writes a token's key and value of one group to the cache.
    template <typename T> void keep(int64_t row, int64_t query, int64_t group) const {
        const int64_t place = places[row * queries + query] * size;
        rotate_head(new_head<T>(row, query, heads + group), key_norm, row, query, cache<T>(keys, row, group) + place);
        std::memcpy(cache<T>(cached, row, group) + place, new_head<T>(row, query, heads + groups + group),
                    size * sizeof(T));
    }
};

// Input and output of the harness's programs: binary files of little-endian int64, float64 and arrays, written and
// read by tests/cpu_harness.py. Arrays come to lie in heap buffers of exactly their size, for AddressSanitizer's sake.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

namespace harness {

class Buffer {
 public:
  // What is not written stays recognisable: every byte 0xff is a NaN in float32 and float64.
  explicit Buffer(size_t bytes) : bytes_(bytes), data_(bytes ? new unsigned char[bytes] : nullptr) {
    if (bytes) std::memset(data_.get(), 0xff, bytes);
  }

  // Null if there is nothing in it.
  template <class T = void>
  T* get() const {
    return reinterpret_cast<T*>(data_.get());
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (!file_) fail("cannot open the input");
  }
  ~Reader() { std::fclose(file_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  template <class T = int64_t>
  T number() {
    T value;
    read(&value, sizeof(T));
    return value;
  }

  // The number of its bytes, then the bytes.
  Buffer buffer() {
    Buffer buffer(static_cast<size_t>(number()));
    read(buffer.get(), buffer.bytes());
    return buffer;
  }

 private:
  void read(void* to, size_t bytes) {
    if (bytes && std::fread(to, 1, bytes, file_) != bytes) fail("the input is too short");
  }
  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "harness: %s\n", what);
    std::exit(2);
  }

  std::FILE* file_;
};

class Writer {
 public:
  explicit Writer(const char* path) : file_(std::fopen(path, "wb")) {}
  ~Writer() { std::fclose(file_); }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  void number(int64_t value) { std::fwrite(&value, sizeof value, 1, file_); }
  void buffer(const Buffer& buffer) {
    number(static_cast<int64_t>(buffer.bytes()));
    if (buffer.bytes()) std::fwrite(buffer.get(), 1, buffer.bytes(), file_);
  }

 private:
  std::FILE* file_;
};

}  // namespace harness

template <class T>
void distribution(const void* data, int64_t n, ChunkDistribution& out) {
  const auto* x = static_cast<const typename T::Storage*>(data);
  const ExponentRange& range = sizeof(x[0]) == 8 && !Values<T>::kWhole ? kWide : kNarrow;
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t size = n - i < kPart ? n - i : kPart;
    Values<T>::of(x + i, size, scratch());
    read_values(scratch(), size, range, out);
  }
}

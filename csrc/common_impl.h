// Loops that every instruction set shares. Included once per instruction set with FTFAST_TARGET set to the function
// attribute and inside its own namespace, so that the compiler vectorises the same source for each of them. The order
// of float64 additions is part of the contract: 32 lanes, then a fixed tree.

FTFAST_TARGET static double reduce_lanes(const double* lanes) {
  double half[16], quarter[8], eighth[4];
  for (int i = 0; i < 16; ++i) half[i] = lanes[i] + lanes[i + 16];
  for (int i = 0; i < 8; ++i) quarter[i] = half[i] + half[i + 8];
  for (int i = 0; i < 4; ++i) eighth[i] = quarter[i] + quarter[i + 4];
  return (eighth[0] + eighth[2]) + (eighth[1] + eighth[3]);
}

FTFAST_TARGET static double dot_f64(const float* q, const float* x, int64_t width, double* square) {
  alignas(64) double product[32] = {0};
  alignas(64) double squares[32] = {0};
  const int64_t whole = width / 32 * 32;
  for (int64_t j = 0; j < whole; j += 32)
    for (int i = 0; i < 32; ++i) product[i] += static_cast<double>(q[j + i]) * static_cast<double>(x[j + i]);
  for (int64_t j = whole; j < width; ++j) product[j - whole] += static_cast<double>(q[j]) * static_cast<double>(x[j]);
  if (square != nullptr) {
    for (int64_t j = 0; j < whole; j += 32)
      for (int i = 0; i < 32; ++i) squares[i] += static_cast<double>(x[j + i]) * static_cast<double>(x[j + i]);
    for (int64_t j = whole; j < width; ++j)
      squares[j - whole] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    *square = reduce_lanes(squares);
  }
  return reduce_lanes(product);
}

FTFAST_TARGET static double distance_f64(const float* q, const float* x, int64_t width) {
  alignas(64) double lanes[32] = {0};
  const int64_t whole = width / 32 * 32;
  for (int64_t j = 0; j < whole; j += 32)
    for (int i = 0; i < 32; ++i) {
      const double difference = static_cast<double>(q[j + i]) - static_cast<double>(x[j + i]);
      lanes[i] += difference * difference;
    }
  for (int64_t j = whole; j < width; ++j) {
    const double difference = static_cast<double>(q[j]) - static_cast<double>(x[j]);
    lanes[j - whole] += difference * difference;
  }
  return reduce_lanes(lanes);
}

FTFAST_TARGET static float sum16(const float* lanes) {
  float total = 0.0f;
  for (int i = 0; i < 16; ++i) total += lanes[i];
  return total;
}

// y = a x - mean into `target`; returns its largest magnitude and (a float32 sum of) its squares. `count` is a multiple
// of sixteen.
FTFAST_TARGET static void shift_row(const float* x, const float* mean, float a, int64_t count, float* target,
                                    float* largest, float* squares) {
  alignas(64) float top[16] = {0};
  alignas(64) float sum[16] = {0};
  for (int64_t j = 0; j < count; j += 16)
    for (int i = 0; i < 16; ++i) {
      const float y = a * x[j + i] - mean[j + i];
      const float magnitude = __builtin_fabsf(y);
      target[j + i] = y;
      top[i] = top[i] < magnitude ? magnitude : top[i];
      sum[i] += y * y;
    }
  float best = 0.0f;
  for (int i = 0; i < 16; ++i) best = best < top[i] ? top[i] : best;
  *largest = best;
  *squares = sum16(sum);
}

// int8 copy y' = scale u, stored as u + 128; sums of squares of y - y' and of u.
FTFAST_TARGET static void round_int8(const float* y, float scale, float inverse, int64_t count, uint8_t* target,
                                     float* residual, float* squares) {
  constexpr float kMagic = 12582912.0f;  // adding and subtracting 1.5 * 2^23 rounds to the nearest integer
  alignas(64) float lost[16] = {0};
  alignas(64) float sum[16] = {0};
  for (int64_t j = 0; j < count; j += 16)
    for (int i = 0; i < 16; ++i) {
      const float u = (y[j + i] * inverse + kMagic) - kMagic;
      const float difference = y[j + i] - scale * u;
      lost[i] += difference * difference;
      sum[i] += u * u;
      target[j + i] = static_cast<uint8_t>(static_cast<int32_t>(u) + 128);
    }
  *residual = sum16(lost);
  *squares = sum16(sum);
}

FTFAST_TARGET static void round_bf16(const float* y, int64_t count, uint16_t* target, float* residual,
                                     float* squares) {
  alignas(64) float lost[16] = {0};
  alignas(64) float sum[16] = {0};
  for (int64_t j = 0; j < count; j += 16)
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, y + j + i, 4);
      bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
      float rounded;
      __builtin_memcpy(&rounded, &bits, 4);
      const float difference = y[j + i] - rounded;
      lost[i] += difference * difference;
      sum[i] += rounded * rounded;
      target[j + i] = static_cast<uint16_t>(bits >> 16);
    }
  *residual = sum16(lost);
  *squares = sum16(sum);
}

// One row of the shadow. Errors counted, with e = 2^-24: y is off by at most 3 e (|y| + |mean|) (product, difference
// and the rounding of a), y - y' by 2 e |y| more, a sum of `padded` float32 squares by a relative padded e. A row whose
// norm is not within 2^-40 .. 2^40 (nor zero), or is not finite, gets an infinite residual: it always survives.
FTFAST_TARGET static EncodedRow encode_row(const EncodeArgs& args, Mode mode, uint32_t* target) {
  const double norm = __builtin_sqrt(dot_f64(args.row, args.row, args.width, nullptr));
  const bool wild = !(norm == 0.0 || (norm > 0x1p-40 && norm < 0x1p40)) || !(args.mean_norm < 0x1p40);
  if (wild) {
    const uint32_t zero = mode == Mode::int8 ? 0x80808080u : 0u;
    const int64_t count = args.padded / (mode == Mode::int8 ? 4 : mode == Mode::bf16 ? 2 : 1);
    for (int64_t j = 0; j < count; ++j) target[j * kPanel] = zero;
    return {0.0f, __builtin_inff(), 0.0f, 0.0f};
  }
  const float a = args.metric == Metric::cosine && norm > 0.0 ? static_cast<float>(1.0 / norm) : 1.0f;
  const int64_t count = (args.padded + 15) / 16 * 16;
  float* y = args.scratch;
  float largest, squares;
  shift_row(args.row, args.mean, a, count, y, &largest, &squares);
  const double loose = 1.0 + static_cast<double>(args.padded) * 0x1p-24 + 0x1p-18;
  const double y_norm = __builtin_sqrt(static_cast<double>(squares)) * loose;
  const double slack = 0x1p-21 * (y_norm + args.mean_norm) + 0x1p-90;
  double residual = slack, scale = 1.0, kept = y_norm;
  float lost = 0.0f, sum = 0.0f;
  if (mode == Mode::int8) {
    const float step = largest > 0x1p-60f ? largest / 127.0f : 1.0f;  // below, everything rounds to zero
    uint8_t* bytes = reinterpret_cast<uint8_t*>(y + count);
    round_int8(y, step, 1.0f / step, count, bytes, &lost, &sum);
    const uint32_t* source = reinterpret_cast<const uint32_t*>(bytes);
    for (int64_t j = 0; j < args.padded / 4; ++j) target[j * kPanel] = source[j];
    scale = step;
    kept = step * __builtin_sqrt(static_cast<double>(sum)) * loose;
    residual += __builtin_sqrt(static_cast<double>(lost)) * loose;
  } else if (mode == Mode::bf16) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(y + count);
    round_bf16(y, count, halves, &lost, &sum);
    const uint32_t* source = reinterpret_cast<const uint32_t*>(halves);
    for (int64_t j = 0; j < args.padded / 2; ++j) target[j * kPanel] = source[j];
    kept = __builtin_sqrt(static_cast<double>(sum)) * loose;
    residual += __builtin_sqrt(static_cast<double>(lost)) * loose;
  } else {
    const uint32_t* source = reinterpret_cast<const uint32_t*>(y);
    for (int64_t j = 0; j < args.padded; ++j) target[j * kPanel] = source[j];
  }
  double offset = 0.0;
  if (args.metric == Metric::l2) {
    offset = 0.5 * static_cast<double>(squares) / (loose * loose) - 0x1p-21 * y_norm * (y_norm + args.mean_norm);
    offset = offset > 0.0 ? offset : 0.0;
  }
  return {static_cast<float>(scale), static_cast<float>(residual * (1.0 + 0x1p-20)),
          static_cast<float>(kept * (1.0 + 0x1p-20)), static_cast<float>(offset * (1.0 - 0x1p-20))};
}

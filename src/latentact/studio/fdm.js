// Forward dynamics in the browser: the operations that graph.py writes, on tensors {shape, data}.
window.latentactFdm = (() => {
  "use strict";
  const size = (shape) => shape.reduce((product, n) => product * n, 1);
  const tensor = (shape, data) => ({ shape, data: data || new Float64Array(size(shape)) });
  const axisOf = (x, axis) => (axis < 0 ? axis + x.shape.length : axis);

  function strides(shape) {
    const out = new Array(shape.length);
    let step = 1;
    for (let i = shape.length - 1; i >= 0; i -= 1) { out[i] = step; step *= shape[i]; }
    return out;
  }

  // Gather x by strides of the result's axes and an offset.
  function gather(x, shape, steps, offset = 0) {
    const out = tensor(shape), count = out.data.length, index = new Int32Array(shape.length);
    let at = offset;
    for (let i = 0; i < count; i += 1) {
      out.data[i] = x.data[at];
      for (let axis = shape.length - 1; axis >= 0; axis -= 1) {
        at += steps[axis];
        index[axis] += 1;
        if (index[axis] < shape[axis]) break;
        at -= steps[axis] * shape[axis];
        index[axis] = 0;
      }
    }
    return out;
  }

  function expand(x, shape) {
    if (size(x.shape) === size(shape)) return tensor(shape, x.data);
    const own = strides(x.shape), lead = shape.length - x.shape.length;
    return gather(x, shape, shape.map((n, i) => (i < lead || x.shape[i - lead] === 1 ? 0 : own[i - lead])));
  }

  function binary(a, b, f) {
    if (typeof b === "number") return tensor(a.shape, a.data.map((v) => f(v, b)));
    if (typeof a === "number") return tensor(b.shape, b.data.map((v) => f(a, v)));
    const rank = Math.max(a.shape.length, b.shape.length), shape = new Array(rank);
    for (let i = 1; i <= rank; i += 1) shape[rank - i] = Math.max(a.shape.at(-i) || 1, b.shape.at(-i) || 1);
    const [x, y] = [expand(a, shape).data, expand(b, shape).data], out = tensor(shape);
    for (let i = 0; i < x.length; i += 1) out.data[i] = f(x[i], y[i]);
    return out;
  }

  // rows [p, k] times columns [o, k], both with k contiguous, to [o, p]: two rows and four columns at a time.
  function product(rows, columns, p, o, k, out, bias) {
    for (let c = 0; c < o; c += 4) {
      const c0 = c * k, c1 = Math.min(c + 1, o - 1) * k, c2 = Math.min(c + 2, o - 1) * k, c3 = Math.min(c + 3, o - 1) * k;
      for (let r = 0; r < p; r += 2) {
        const r0 = r * k, r1 = Math.min(r + 1, p - 1) * k;
        let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
        for (let i = 0; i < k; i += 1) {
          const x = rows[r0 + i], y = rows[r1 + i], w0 = columns[c0 + i], w1 = columns[c1 + i], w2 = columns[c2 + i], w3 = columns[c3 + i];
          a0 += x * w0; a1 += x * w1; a2 += x * w2; a3 += x * w3;
          b0 += y * w0; b1 += y * w1; b2 += y * w2; b3 += y * w3;
        }
        const a = [a0, a1, a2, a3], b = [b0, b1, b2, b3];
        for (let j = 0; j < Math.min(4, o - c); j += 1) {
          const add = bias ? bias[c + j] : 0, at = (c + j) * p + r;
          out[at] = a[j] + add;
          if (r + 1 < p) out[at + 1] = b[j] + add;
        }
      }
    }
  }

  function convolution(x, weight, bias, stride, padding) {
    const [batch, channels, height, width] = x.shape, [outputs, , kh, kw] = weight.shape;
    const h = Math.floor((height + 2 * padding[0] - kh) / stride[0]) + 1, w = Math.floor((width + 2 * padding[1] - kw) / stride[1]) + 1;
    const k = channels * kh * kw, out = tensor([batch, outputs, h, w]), rows = new Float64Array(h * w * k);
    for (let b = 0; b < batch; b += 1) {
      rows.fill(0);
      for (let c = 0; c < channels; c += 1) for (let dy = 0; dy < kh; dy += 1) for (let dx = 0; dx < kw; dx += 1) {
        const column = (c * kh + dy) * kw + dx;
        for (let y = 0; y < h; y += 1) {
          const sy = y * stride[0] + dy - padding[0];
          if (sy < 0 || sy >= height) continue;
          const from = ((b * channels + c) * height + sy) * width;
          for (let px = 0; px < w; px += 1) {
            const sx = px * stride[1] + dx - padding[1];
            if (sx >= 0 && sx < width) rows[(y * w + px) * k + column] = x.data[from + sx];
          }
        }
      }
      product(rows, weight.data, h * w, outputs, k, out.data.subarray(b * outputs * h * w, (b + 1) * outputs * h * w), bias && bias.data);
    }
    return out;
  }

  function matmul(a, b) {
    const [n, k] = a.shape, m = b.shape[1], out = tensor([n, m]);
    for (let i = 0; i < n; i += 1) for (let j = 0; j < k; j += 1) {
      const v = a.data[i * k + j];
      for (let c = 0; c < m; c += 1) out.data[i * m + c] += v * b.data[j * m + c];
    }
    return out;
  }

  function bmm(a, b) {
    const parts = [];
    for (let i = 0; i < a.shape[0]; i += 1) {
      const part = (x) => tensor(x.shape.slice(1), x.data.subarray(i * x.shape[1] * x.shape[2], (i + 1) * x.shape[1] * x.shape[2]));
      parts.push(matmul(part(a), part(b)));
    }
    const out = tensor([a.shape[0], a.shape[1], b.shape[2]]);
    parts.forEach((each, i) => out.data.set(each.data, i * each.data.length));
    return out;
  }

  function slice(x, axis = 0, start = 0, stop = 2 ** 31, step = 1) {
    const own = strides(x.shape), d = axisOf(x, axis), n = x.shape[d];
    const clip = (v) => Math.min(Math.max(v < 0 ? v + n : v, 0), n);
    const [from, to] = [clip(start ?? 0), clip(stop ?? n)], shape = [...x.shape];
    shape[d] = Math.max(0, Math.ceil((to - from) / step));
    return gather(x, shape, own.map((v, i) => (i === d ? v * step : v)), from * own[d]);
  }

  function cat(parts, axis = 0) {
    const d = axisOf(parts[0], axis), shape = [...parts[0].shape];
    shape[d] = parts.reduce((sum, each) => sum + each.shape[d], 0);
    const out = tensor(shape), outer = size(shape.slice(0, d)), inner = size(shape.slice(d + 1));
    let at = 0;
    for (const each of parts) {
      const run = each.shape[d] * inner;
      for (let i = 0; i < outer; i += 1) out.data.set(each.data.subarray(i * run, (i + 1) * run), i * shape[d] * inner + at);
      at += run;
    }
    return out;
  }

  function permute(x, order) {
    const own = strides(x.shape), axes = order.map((i) => axisOf(x, i));
    return gather(x, axes.map((i) => x.shape[i]), axes.map((i) => own[i]));
  }

  function repeat(x, times) {
    const lead = times.length - x.shape.length, full = [...new Array(lead).fill(1), ...x.shape];
    const shape = [], steps = [], own = strides(full);
    times.forEach((n, i) => { shape.push(n, full[i]); steps.push(0, own[i]); });
    return tensor(full.map((n, i) => n * times[i]), gather(x, shape, steps).data);
  }

  // Rows along the last axes, each replaced by f(row).
  function rowwise(x, length, f) {
    const out = tensor(x.shape);
    for (let i = 0; i < x.data.length; i += length) out.data.set(f(x.data.subarray(i, i + length)), i);
    return out;
  }

  function layerNorm(x, shape, weight, bias, epsilon) {
    return rowwise(x, size(shape), (row) => {
      const mean = row.reduce((a, b) => a + b, 0) / row.length;
      const scale = 1 / Math.sqrt(row.reduce((a, b) => a + (b - mean) ** 2, 0) / row.length + epsilon);
      return row.map((v, i) => (v - mean) * scale * (weight ? weight.data[i] : 1) + (bias ? bias.data[i] : 0));
    });
  }

  function softmax(x, axis) {
    const d = axisOf(x, axis), last = x.shape.length - 1, order = x.shape.map((_, i) => (i === d ? last : i === last ? d : i));
    const moved = permute(x, order), done = rowwise(moved, moved.shape[last], (row) => {
      const top = Math.max(...row), exps = row.map((v) => Math.exp(v - top)), sum = exps.reduce((a, b) => a + b, 0);
      return exps.map((v) => v / sum);
    });
    return permute(done, order);
  }

  function maxPool(x, kernel, stride, padding = [0, 0]) {
    const by = stride && stride.length ? stride : kernel, pad = padding.length ? padding : [0, 0];
    const [batch, channels, height, width] = x.shape;
    const h = Math.floor((height + 2 * pad[0] - kernel[0]) / by[0]) + 1, w = Math.floor((width + 2 * pad.at(-1) - kernel[1]) / by[1]) + 1;
    const out = tensor([batch, channels, h, w]);
    for (let c = 0; c < batch * channels; c += 1) for (let y = 0; y < h; y += 1) for (let px = 0; px < w; px += 1) {
      let best = -Infinity;
      for (let dy = 0; dy < kernel[0]; dy += 1) for (let dx = 0; dx < kernel[1]; dx += 1) {
        const sy = y * by[0] + dy - pad[0], sx = px * by[1] + dx - pad.at(-1);
        if (sy >= 0 && sy < height && sx >= 0 && sx < width) best = Math.max(best, x.data[(c * height + sy) * width + sx]);
      }
      out.data[(c * h + y) * w + px] = best;
    }
    return [out];
  }

  function split(x, sizes, axis = 0) {
    let at = 0;
    return sizes.map((n) => slice(x, axis, at, (at += n)));
  }

  // Abramowitz and Stegun 7.1.26 is not precise enough; this series is, to 1e-7.
  function erf(x) {
    const t = 1 / (1 + 0.5 * Math.abs(x));
    const poly = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277];
    const tau = t * Math.exp(-x * x + poly.reduceRight((sum, c) => sum * t + c, 0));
    return x >= 0 ? 1 - tau : tau - 1;
  }

  function even(x) {
    const near = Math.round(x);
    return Math.abs(x % 1) === 0.5 && near % 2 ? near - 1 : near;
  }

  const each = (f) => (x, ...more) => tensor(x.shape, x.data.map((v) => f(v, ...more)));
  const OPERATIONS = {
    copy: (x) => x,
    add: (a, b) => binary(a, b, (x, y) => x + y),
    sub: (a, b) => binary(a, b, (x, y) => x - y),
    mul: (a, b) => binary(a, b, (x, y) => x * y),
    div: (a, b) => binary(a, b, (x, y) => x / y),
    relu: each((v) => (v > 0 ? v : 0)),
    leaky_relu: each((v, slope = 0.01) => (v > 0 ? v : v * slope)),
    tanh: each(Math.tanh),
    sigmoid: each((v) => 1 / (1 + Math.exp(-v))),
    silu: each((v) => v / (1 + Math.exp(-v))),
    gelu: each((v) => 0.5 * v * (1 + erf(v / Math.SQRT2))),
    exp: each(Math.exp),
    sqrt: each(Math.sqrt),
    rsqrt: each((v) => 1 / Math.sqrt(v)),
    neg: each((v) => -v),
    abs: each(Math.abs),
    round: each(even),
    clamp: each((v, low, high) => Math.min(Math.max(v, low ?? -Infinity), high ?? Infinity)),
    convolution,
    mm: matmul,
    bmm,
    addmm: (bias, a, b) => binary(matmul(a, b), bias, (x, y) => x + y),
    view: (x, shape) => tensor(shape, x.data),
    unsqueeze: (x, axis) => { const shape = [...x.shape]; shape.splice(axis < 0 ? axis + shape.length + 1 : axis, 0, 1); return tensor(shape, x.data); },
    permute,
    expand,
    repeat,
    slice,
    select: (x, axis, index) => { const at = axisOf(x, axis), i = index < 0 ? index + x.shape[at] : index, part = slice(x, axis, i, i + 1); return tensor(x.shape.filter((_, j) => j !== at), part.data); },
    take: (x, axis, indices) => cat(indices.map((i) => { const at = i < 0 ? i + x.shape[axis] : i; return slice(x, axis, at, at + 1); }), axis),
    cat,
    split_with_sizes: split,
    getitem: (parts, i) => parts[i],
    max_pool2d_with_indices: maxPool,
    native_layer_norm: (x, shape, weight, bias, epsilon) => [layerNorm(x, shape, weight, bias, epsilon)],
    _softmax: softmax,
  };

  // Numbers of 16 bits.
  function halves(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), view = new DataView(bytes.buffer), out = new Float64Array(bytes.length / 2);
    for (let i = 0; i < out.length; i += 1) {
      const bits = view.getUint16(2 * i, true), sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
      out[i] = sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
    }
    return out;
  }

  // Return predict(frames, vectors): tensors in, the next frame [1, 3, h, w] of 0..255 out.
  function load(graph) {
    const weights = halves(graph.weights), constants = new Map();
    for (const [name, { shape, at }] of Object.entries(graph.constants)) constants.set(name, tensor(shape, weights.subarray(at, at + size(shape))));
    return (...given) => {
      const values = new Map(constants);
      graph.inputs.forEach((name, i) => values.set(name, given[i]));
      const resolve = (arg) => (Array.isArray(arg) ? arg.map(resolve) : arg && arg.ref ? values.get(arg.ref) : arg ?? undefined);
      for (const { op, out, args } of graph.nodes) values.set(out, OPERATIONS[op](...args.map(resolve)));
      return values.get(graph.output);
    };
  }

  return { load, tensor };
})();

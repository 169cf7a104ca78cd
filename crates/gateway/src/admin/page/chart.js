'use strict';
// What was seen in the last two minutes, and what can be said of it.

const KEPT = 120; // seconds
const history = new Map();

/** An element: everything from outside goes in as text, never as markup. */
function el(tag, attributes, ...children) {
  const drawn = ['svg', 'path', 'line'].includes(tag);
  const node = drawn ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === 'function') node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null).map(child => child instanceof Node ? child : String(child)));
  return node;
}

/** Keeps what was read of something, and gives all that is kept of it. */
function note(key, now, sample) {
  const samples = history.get(key) || [];
  // It began anew: what was before is another's.
  if (samples.length && sample.requests < samples[samples.length - 1].requests) samples.length = 0;
  samples.push({ now, ...sample });
  while (samples.length > 1 && now - samples[0].now > KEPT * 1000) samples.shift();
  history.set(key, samples);
  return samples;
}

/** Forgets what is no longer there. */
function forget(now) {
  for (const [key, samples] of history) if (now - samples[samples.length - 1].now > KEPT * 1000) history.delete(key);
}

const last = samples => samples[samples.length - 1];
const since = (samples, seconds) => samples.find(sample => last(samples).now - sample.now <= seconds * 1000) || last(samples);

/** How fast a number grew, per second. */
function rate(samples, field, seconds) {
  const end = last(samples), start = since(samples, seconds), took = (end.now - start.now) / 1000;
  return took > 0 ? Math.max(0, end[field] - start[field]) / took : 0;
}

/** Within what time a share of the requests was done, lately or, if there was none lately, ever. */
function quantile(samples, share, bounds, seconds = 60) {
  const end = last(samples), start = since(samples, seconds);
  const recent = end.buckets.map((count, index) => Math.max(0, count - (start === end ? 0 : start.buckets[index])));
  const counts = recent.some(count => count) ? recent : end.buckets;
  const wanted = share * counts.reduce((sum, count) => sum + count, 0);
  let seen = 0;
  for (let index = 0; index < counts.length; index++) {
    if (counts[index] && seen + counts[index] >= wanted) {
      const low = index ? bounds[index - 1] : 0, high = index < bounds.length ? bounds[index] : low;
      return low + (high - low) * (wanted - seen) / counts[index];
    }
    seen += counts[index];
  }
  return null;
}

/** The steps of a number, per second. */
const steps = (samples, field) => samples.slice(1).map((sample, index) => {
  const took = (sample.now - samples[index].now) / 1000;
  return { at: KEPT - (last(samples).now - sample.now) / 1000, value: took > 0 ? Math.max(0, sample[field] - samples[index][field]) / took : 0 };
});

/** Two minutes of some numbers, each over the one before. */
function chart(samples, fields, label, width, height, grid) {
  const svg = el('svg', { class: grid ? 'area-chart' : 'spark', viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': label });
  if (grid) for (const part of [.25, .5, .75]) svg.append(el('line', { class: 'grid', x1: 0, x2: width, y1: height * part, y2: height * part, 'vector-effect': 'non-scaling-stroke' }));
  svg.append(el('line', { class: 'grid', x1: 0, x2: width, y1: height - .5, y2: height - .5, 'vector-effect': 'non-scaling-stroke' }));
  const all = fields.map(field => steps(samples, field));
  const top = Math.max(1e-9, ...all.flat().map(step => step.value)) * 1.08;
  all.forEach((values, index) => {
    if (!values.some(step => step.value)) return;
    const x = step => (width * step.at / KEPT).toFixed(1), y = step => (height - 1 - (height - 2) * step.value / top).toFixed(1);
    const line = values.map((step, at) => (at ? 'L' : 'M') + x(step) + ' ' + y(step)).join('');
    const kind = index ? ' errors' : '';
    svg.append(el('path', { class: 'area' + kind, d: `${line}L${width} ${height}L${x(values[0])} ${height}Z` }));
    svg.append(el('path', { class: 'line' + kind, d: line, 'vector-effect': 'non-scaling-stroke' }));
  });
  return svg;
}
const spark = (samples, label) => chart(samples, ['requests', 'errors'], label, 112, 24, false);

const number = value => Number(value || 0).toLocaleString('en');
const per = value => (value >= 1000 ? number(Math.round(value)) : value >= 100 ? value.toFixed(0) : String(Number(value.toFixed(value < 1 ? 2 : 1))));
const time = seconds => seconds === null ? '–' : seconds < 0.001 ? (seconds * 1e6).toFixed(0) + ' µs' : seconds < 1 ? (seconds * 1e3).toFixed(1) + ' ms' : seconds.toFixed(2) + ' s';
const size = bytes => {
  let unit = 0;
  while (bytes >= 1024 && unit < 4) { bytes /= 1024; unit++; }
  return (unit && bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)) + ' ' + ['B', 'KiB', 'MiB', 'GiB', 'TiB'][unit];
};
const span = seconds => seconds < 120 ? seconds + ' s' : seconds < 7200 ? Math.floor(seconds / 60) + ' min' : seconds < 172800 ? Math.floor(seconds / 3600) + ' h' : Math.floor(seconds / 86400) + ' d';

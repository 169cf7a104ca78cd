'use strict';

const $ = id => document.getElementById(id);
const MOST = 40; // boxes in a column of the map
const ROWS = 200; // rows of a table
let state = null, paused = false, wanted = '';

const row = (...cells) => el('tr', {}, ...cells.map(cell =>
  cell instanceof Node ? (cell.tagName === 'TD' ? cell : el('td', {}, cell)) :
    typeof cell === 'object' ? el('td', { class: cell.class }, cell.text) : el('td', {}, cell)));
const n = (text, shade) => ({ text, class: 'n ' + (shade || '') });

/** What an endpoint does with requests: in words, its shade, and one word. */
function condition(endpoint) {
  const { breaker, health } = endpoint;
  switch (endpoint.condition) {
    case 'held': return ['held open by hand', 'warn'];
    case 'sick': return ['sick: ' + ((health && health.problem) || 'checks fail'), 'bad'];
    case 'open': return ['breaker open' + (breaker.opens_in_seconds ? ', ' + Math.ceil(breaker.opens_in_seconds) + ' s' : ''), 'bad'];
    case 'half-open': return ['breaker half-open', 'warn'];
    case 'refusing': return ['refuses', 'warn'];
    default: return breaker.forced === 'closed' ? ['held closed by hand', 'warn'] : ['well', 'good'];
  }
}
const dot = shade => el('span', { class: 'dot ' + shade, 'aria-hidden': 'true' });

function leads(route) {
  if (route.does !== 'send') return route.does;
  const sum = route.to.reduce((sum, to) => sum + to.weight, 0);
  return route.to.map(to => to.service + (route.to.length > 1 ? ' ' + Math.round(100 * to.weight / sum) + ' %' : '')).join(', ');
}

/** Replaces what is there, and gives the focus back to what had it. */
function fill(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.id : null;
  parent.replaceChildren(...children);
  if (focused && $(focused)) $(focused).focus({ preventScroll: true });
}

/** Asks in a dialog; null when the answer is no. */
function ask(what, { text = false, yes = 'OK', no = true } = {}) {
  const dialog = $('ask');
  $('ask-what').textContent = what;
  $('ask-text').hidden = !text;
  $('ask-text').value = '';
  $('ask-yes').textContent = yes;
  $('ask-no').hidden = !no;
  dialog.returnValue = '';
  dialog.showModal();
  if (answered) answered(null);
  return new Promise(done => { answered = done; });
}
let answered = null;
$('ask').addEventListener('close', () => {
  // It comes a moment after the fact: the next question may be open by then.
  if ($('ask').open || !answered) return;
  const done = answered;
  answered = null;
  done($('ask').returnValue ? $('ask-text').value : null);
});

async function order(path, body) {
  const headers = { 'content-type': 'application/json' };
  const token = sessionStorage.getItem('token');
  if (token) headers.authorization = 'Bearer ' + token;
  const response = await fetch(path, { method: 'POST', headers, body: JSON.stringify(body || {}) });
  if (response.status === 401) {
    const given = await ask('The operators’ token', { text: true });
    if (given) { sessionStorage.setItem('token', given); return order(path, body); }
    return;
  }
  const said = (await response.text()).trim();
  if (!response.ok) await ask(said, { no: false });
  look();
}

const fits = (...words) => !wanted || words.some(word => String(word).toLowerCase().includes(wanted));

function drawTop(all, now) {
  const ready = $('ready'), text = state.ready ? 'ready' : 'not ready: ' + state.not_ready;
  if (ready.textContent !== text) ready.textContent = text;
  ready.className = 'pill ' + (state.ready ? 'good' : 'bad');
  $('about').textContent = [state.version, 'up ' + span(state.uptime_seconds), state.file].filter(Boolean).join(' · ');
  $('about').title = state.file || '';
  const sum = { requests: 0, errors: 0, refused: 0, seconds: 0, buckets: state.bounds.map(() => 0).concat(0) };
  for (const one of all) {
    for (const field of ['requests', 'errors', 'refused', 'seconds']) sum[field] += one[field];
    one.buckets.forEach((count, index) => { sum.buckets[index] += count; });
  }
  if (!history.has('all')) {
    // What was before the page was opened.
    const none = state.bounds.map(() => 0).concat(0);
    history.set('all', state.history.slice(0, -1).map(([ago, requests, errors, refused]) => ({ now: now - 1000 * ago, requests, errors, refused, buckets: none })));
  }
  const samples = note('all', now, sum), requests = rate(samples, 'requests', 10), errors = rate(samples, 'errors', 10);
  const big = (id, value, unit) => $(id).replaceChildren(value, el('small', {}, ' ' + unit));
  big('t-rate', per(requests), '/s');
  big('t-errors', requests ? per(100 * errors / requests) : '0', '%');
  $('t-errors').classList.toggle('bad', errors > 0);
  $('t-errors-all').textContent = number(sum.errors) + ' in all';
  big('t-refused', per(rate(samples, 'refused', 10)), '/s');
  $('t-refused-all').textContent = number(sum.refused) + ' in all';
  $('t-half').textContent = time(quantile(samples, .5, state.bounds));
  $('t-most').textContent = sum.requests ? '99 % within ' + time(quantile(samples, .99, state.bounds)) : '';
  $('t-active').textContent = number(state.active);
  const endpoints = Object.values(state.services).flatMap(service => service.endpoints);
  $('t-endpoints').textContent = endpoints.length ? endpoints.filter(one => one.condition === 'admitting').length + ' of ' + endpoints.length + ' endpoints well' : 'no endpoint';
  const quiet = last(samples).requests === samples[0].requests ? [el('p', { class: 'soft' }, el('span', {}, 'none in the last two minutes'))] : [];
  fill($('chart'), chart(samples, ['requests', 'errors'], 'Requests and errors in the last two minutes', 600, 64, true), ...quiet);
}

function drawRoutes(routes) {
  const shown = routes.filter(({ route }) => fits(route.name, ...route.to.map(to => to.service), ...route.hosts));
  fill(document.querySelector('#routes tbody'), ...nothing(shown, 11, 'no route'), ...shown.slice(0, ROWS).map(({ route, samples }) => row(
    el('td', {}, el('strong', {}, route.name), ' ', el('span', { class: 'soft' }, [...route.methods, ...route.hosts].join(' '))),
    leads(route), n(per(rate(samples, 'requests', 10)) + ' /s'), spark(samples, 'Requests and errors of ' + route.name),
    n(number(route.errors), route.errors ? 'bad' : ''), n(number(route.refused), route.refused ? 'warn' : ''),
    n(time(quantile(samples, .5, state.bounds))), n(time(quantile(samples, .99, state.bounds))),
    n(size(route.bytes_up)), n(size(route.bytes_down)), n(number(route.requests)))), ...more(shown.length - ROWS, 11));
}

function endpointRow(name, endpoint, samples) {
  const [said, shade] = condition(endpoint), { breaker, connections } = endpoint;
  const button = (word, label) => el('button', {
    type: 'button', id: ['b', name, endpoint.id].join(' '), 'aria-label': label + ' ' + endpoint.address,
    click: () => order('/breaker', { service: name, endpoint: endpoint.id, state: word }),
  }, label);
  const cells = [
    el('td', {}, endpoint.address, el('span', { class: 'soft' }, endpoint.zone ? ' ' + endpoint.zone : '')),
    el('td', { class: shade }, el('span', { class: 'state' }, dot(shade), said)),
    n(per(rate(samples, 'requests', 10)) + ' /s'), spark(samples, 'Attempts and errors of ' + endpoint.address),
    n(number(endpoint.errors), endpoint.errors ? 'bad' : ''), n(number(endpoint.retried)),
    n(time(quantile(samples, .5, state.bounds))), n(time(quantile(samples, .99, state.bounds))), n(number(endpoint.in_flight)),
    n(number(breaker.failed) + (breaker.failures_in_a_row ? ' · ' + breaker.failures_in_a_row + ' in a row' : '')),
    n(connections.open + (connections.idle ? ' · ' + connections.idle + ' idle' : '')), n(number(endpoint.weight)), n(number(endpoint.requests)),
  ];
  if (state.writable) cells.push(el('td', {}, breaker.forced ? button('auto', 'Let go') : button('open', 'Take out')));
  return row(...cells);
}

/** Says that there is nothing to show. */
const nothing = (shown, columns, what) => shown.length ? [] : [el('tr', {}, el('td', { colspan: columns, class: 'soft' }, wanted ? 'nothing contains ' + wanted : what))];

/** Says how many are not shown. */
const more = (count, columns) => count > 0 ? [el('tr', {}, el('td', { colspan: columns, class: 'soft' }, 'and ' + number(count) + ' more; filter to see them'))] : [];

function drawServices(services) {
  const heads = ['Endpoint', 'State', 'Rate', 'Two minutes', 'Errors', 'Retried', 'Half within', '99 % within', 'In flight', 'Breaker saw', 'Connections', 'Weight', 'Attempts'];
  const wide = heads.map((_, index) => index === 2 || index > 3);
  if (state.writable) heads.push('By hand');
  fill($('service-list'), ...services.map(({ name, service, endpoints }) => {
    const shown = endpoints.filter(({ endpoint }) => fits(name, endpoint.address, endpoint.id, condition(endpoint)[0]));
    if (!shown.length && !fits(name)) return el('div', { hidden: '' });
    const { registry, breakers } = service;
    const trouble = registry && registry.problem ? 'the registry has not answered for ' + Math.round(registry.failing_seconds) + ' s: ' + registry.problem : service.known ? '' : 'nothing is known yet';
    const facts = ['↑ ' + size(service.bytes_up) + '  ↓ ' + size(service.bytes_down), number(service.retry_budget) + ' retries to spare',
      'breakers opened ' + number(breakers.opened) + (breakers.ejected ? ', ' + number(breakers.ejected) + ' as outliers' : '')];
    return el('div', { class: 'card service' },
      el('div', { class: 'top' }, el('h3', {}, name), ...facts.map(fact => el('span', { class: 'soft' }, fact)), el('span', { class: 'bad' }, trouble)),
      el('div', { class: 'scroll' }, el('table', { 'aria-label': 'Endpoints of ' + name },
        el('thead', {}, el('tr', {}, ...heads.map((head, index) => el('th', { scope: 'col', class: wide[index] ? 'n' : '' }, head)))),
        el('tbody', {}, ...nothing(shown, heads.length, 'no endpoint is known'), ...shown.slice(0, ROWS).map(({ endpoint, samples }) => endpointRow(name, endpoint, samples)), ...more(shown.length - ROWS, heads.length)))));
  }));
}

function drawMap(routes, services) {
  const busy = samples => rate(samples, 'requests', 3) > 0;
  const box = (column, key, name, speed, hot, said, shade) => el('button', {
    type: 'button', class: 'box' + (hot ? ' hot' : ''), 'data-shade': shade, id: 'm ' + column + ' ' + key, 'data-column': column, title: name,
    'aria-label': name + (said ? ', ' + said : '') + ', ' + per(speed) + ' a second', click: () => only(wanted ? '' : name),
  }, shade ? dot(shade) : null, el('b', {}, name), said && said !== 'well' ? el('span', { class: shade }, said) : null, el('span', { class: 'rate' }, per(speed) + ' /s'));
  const left = routes.filter(({ route }) => fits(route.name, ...route.to.map(to => to.service))).slice(0, MOST);
  const middle = services.filter(({ name, endpoints }) => fits(name, ...endpoints.map(({ endpoint }) => endpoint.address)) || left.some(({ route }) => route.to.some(to => to.service === name))).slice(0, MOST);
  const right = middle.flatMap(({ name, endpoints }) => endpoints.map(one => ({ name, ...one }))).filter(({ name, endpoint }) => fits(name, endpoint.address) || left.length < routes.length).slice(0, MOST);
  const sum = ({ endpoints }) => endpoints.reduce((sum, { samples }) => sum + rate(samples, 'requests', 10), 0);
  const names = middle.map(({ name }) => name);
  const wires = (from, to, list) => {
    const svg = el('svg', { class: 'wires', viewBox: '0 0 100 100', preserveAspectRatio: 'none', 'aria-hidden': 'true' });
    list.filter(([a, b]) => a >= 0 && b >= 0).forEach(([a, b, hot, shade]) => {
      const [y, z] = [100 * (a + .5) / from, 100 * (b + .5) / to];
      svg.append(el('path', { d: `M0 ${y}C50 ${y} 50 ${z} 100 ${z}`, class: hot ? 'hot' : '', 'data-shade': shade, 'vector-effect': 'non-scaling-stroke' }));
    });
    return svg;
  };
  const column = (boxes, otherwise) => el('div', { class: 'column' }, ...(boxes.length ? boxes : [el('p', { class: 'soft' }, wanted ? 'nothing contains ' + wanted : otherwise)]));
  /** What is the matter with a route lately. */
  const matter = ({ route, samples }) => {
    const requests = rate(samples, 'requests', 10), errors = rate(samples, 'errors', 10);
    return route.does !== 'send' ? [route.does, ''] : errors ? [per(100 * errors / requests) + ' % errors', 'bad'] : ['', ''];
  };
  /** How many of a service's endpoints are well. */
  const health = ({ service, endpoints }) => {
    const well = endpoints.filter(({ endpoint }) => condition(endpoint)[1] === 'good').length;
    if (!service.known) return ['not known yet', 'bad'];
    if (well === endpoints.length) return endpoints.length ? ['', 'good'] : ['no endpoint', 'bad'];
    return [well + ' of ' + endpoints.length + ' well', well ? 'warn' : 'bad'];
  };
  fill($('map'),
    column(left.map(one => box(0, one.route.name, one.route.name, rate(one.samples, 'requests', 10), busy(one.samples), ...matter(one))), 'there is no route'),
    wires(left.length, middle.length, left.flatMap(({ route, samples }, index) => route.to.map(to => [index, names.indexOf(to.service), busy(samples)]))),
    column(middle.map(one => box(1, one.name, one.name, sum(one), one.endpoints.some(({ samples }) => busy(samples)), ...health(one))), 'every route answers by itself'),
    wires(middle.length, right.length, right.map(({ name, endpoint, samples }, index) => [names.indexOf(name), index, busy(samples), condition(endpoint)[1]])),
    column(right.map(({ name, endpoint, samples }) => box(2, name + ' ' + endpoint.id, endpoint.address, rate(samples, 'requests', 10), busy(samples), ...condition(endpoint))), 'no endpoint is known'));
}

function drawRest() {
  const { limits } = state, rates = Object.entries(limits.rates).map(([name, rate]) => name + ' ' + rate).join(', ');
  $('limits').textContent = rates ? rates + '. ' + number(limits.admitted) + ' admitted, ' + number(limits.refused) + ' refused, ' + number(limits.callers) + (limits.callers === 1 ? ' caller' : ' callers') + ' counted.' : 'No limits.';
  $('refusals').hidden = !state.refusals.length;
  fill(document.querySelector('#refusals tbody'), ...state.refusals.filter(one => fits(one.layer, one.reason, one.route)).map(one => row(one.layer, one.reason, one.route || 'no route', n(number(one.count)))));
  const at = event => el('time', { class: 'soft', datetime: new Date(event.at).toISOString() }, new Date(event.at).toLocaleTimeString('en-GB'));
  fill($('events'), ...(state.events.length ? state.events.map(event => el('li', {}, at(event), el('span', { class: 'soft' }, event.kind), el('span', {}, event.text))) : [el('li', { class: 'soft' }, 'nothing yet')]));
  $('orders').hidden = !state.writable;
  $('reload').hidden = !state.file;
  if (document.activeElement !== $('level')) $('level').value = state.log_level;
}

function draw(now) {
  const routes = state.routes.map(route => ({ route, samples: note('r ' + route.name, now, route) }));
  const unmatched = { route: { ...state.unmatched, name: 'no route', does: 'refused', to: [], hosts: [], methods: [] }, samples: note('r', now, state.unmatched) };
  const services = Object.entries(state.services).map(([name, service]) => ({
    name, service, endpoints: service.endpoints.map(endpoint => ({ endpoint, samples: note(['e', name, endpoint.id].join(' '), now, endpoint) })),
  }));
  forget(now);
  drawTop([...state.routes, state.unmatched], now);
  // Who marks text wants to keep it.
  if (getSelection().type !== 'Range') {
    drawMap(routes, services);
    drawRoutes(state.unmatched.requests ? [...routes, unmatched] : routes);
    drawServices(services);
  }
  drawRest();
  document.body.dataset.drawn = String(Number(document.body.dataset.drawn || 0) + 1);
}

async function look() {
  try {
    const response = await fetch('/state');
    if (!response.ok) throw new Error(await response.text());
    state = await response.json();
    draw(performance.now());
  } catch (error) {
    $('ready').textContent = 'does not answer';
    $('ready').className = 'pill bad';
    console.debug(error);
  }
}

/** Shows only what contains these letters. */
function only(text) {
  $('find').value = text;
  wanted = text.toLowerCase();
  if (state) draw(performance.now());
}

function pause() {
  paused = !paused;
  $('pause').setAttribute('aria-pressed', String(paused));
  $('pause').textContent = paused ? 'Go on' : 'Pause';
}

function theme(next) {
  const themes = ['auto', 'dark', 'light'];
  const now = next || themes[(themes.indexOf(document.documentElement.dataset.theme || 'auto') + 1) % 3];
  document.documentElement.dataset.theme = now;
  $('theme').textContent = 'Theme: ' + now;
  try { localStorage.setItem('theme', now); } catch { /* then it is forgotten */ }
}

/** Moves about the map by arrows. */
function move(key) {
  const here = document.activeElement, boxes = [...document.querySelectorAll('.box')];
  if (!boxes.includes(here)) return false;
  const column = Number(here.dataset.column), at = box => Number(box.dataset.column);
  const same = boxes.filter(box => at(box) === column), middle = box => box.getBoundingClientRect().top;
  const near = list => list.sort((a, b) => Math.abs(middle(a) - middle(here)) - Math.abs(middle(b) - middle(here)))[0];
  const next = {
    ArrowUp: () => same[same.indexOf(here) - 1], ArrowDown: () => same[same.indexOf(here) + 1],
    ArrowLeft: () => near(boxes.filter(box => at(box) === column - 1)), ArrowRight: () => near(boxes.filter(box => at(box) === column + 1)),
  }[key]();
  if (next) next.focus();
  return true;
}

const go = target => () => { const place = typeof target === 'string' ? document.querySelector(target) : target(); if (place) { place.focus(); place.scrollIntoView({ block: 'nearest' }); } };
const KEYS = {
  '/': () => $('find').focus(), m: go('.box'), r: go('#routes'), s: go('#services'), l: go('#refused'), e: go('#events'),
  p: pause, t: () => theme(), '?': () => $('help').showModal(), Escape: () => only(''),
};
document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
  const typing = event.target.matches('input, select');
  if (typing && event.key !== 'Escape') return;
  if (event.key.startsWith('Arrow') ? move(event.key) : KEYS[event.key]) {
    event.preventDefault();
    if (KEYS[event.key]) KEYS[event.key]();
    if (typing) event.target.blur();
  }
});
$('find').addEventListener('input', () => only($('find').value));
$('pause').addEventListener('click', pause);
$('theme').addEventListener('click', () => theme());
$('keys').addEventListener('click', () => $('help').showModal());
$('reload').addEventListener('click', () => order('/reload'));
$('level').addEventListener('change', () => order('/log', { level: $('level').value }));
$('drain').addEventListener('click', async () => { if (await ask('Drain and stop this gateway?', { yes: 'Drain and stop' }) !== null) order('/drain'); });
try { theme(localStorage.getItem('theme') || 'auto'); } catch { theme('auto'); }
look();
setInterval(() => { if (!paused && !document.hidden) look(); }, 1000);

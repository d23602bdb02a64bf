// Draws panels of the dashboards with Grafana's own front end code into PNG files:
//   node tests/k8s/grafana/pictures.mjs --run RUN [--minutes 30] [--url http://127.0.0.1:9095] [--out docs] [--all]
// The data are those that a Prometheus (make monitor) holds of RUN, asked for with the dashboards' queries. It makes
// the pictures of pictures.json; with --all every dashboard as a whole, to look at after a change. It needs node 20.11,
// npm, chromium and about a minute: it installs Grafana's published packages into a temporary folder, or into the one
// that --packages names, where they stay for the next time. Exit code 69 where npm cannot get them. --grafana VERSION
// takes those of another version.
//
// @grafana/ui has the components of curves, single values, bars and tables, which panels.jsx draws. Those of maps
// (status-history) and of alerts exist only in Grafana's server: these panels are left out, as tables are of 11.
import { execFile, execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { parseArgs, promisify } from 'node:util';

const [CELL, GAP, COLUMNS] = [30, 8, 24]; // Grafana's grid: pixels of a row and between panels, columns
const UNAVAILABLE = 69;
const here = import.meta.dirname;

const OPTIONS = {
  run: { type: 'string', default: '.+' },
  url: { type: 'string', default: 'http://127.0.0.1:9095' },
  minutes: { type: 'string', default: '30' },
  scrape: { type: 'string', default: '5' }, // scrape_interval of prometheus.yml, seconds
  out: { type: 'string', default: 'docs' },
  packages: { type: 'string' },
  grafana: { type: 'string', default: '13.2.3' }, // from 11.6 on
  chromium: { type: 'string', default: 'chromium' },
  theme: { type: 'string', default: 'light' },
  width: { type: 'string', default: '1200' },
  scale: { type: 'string', default: '1.5' }, // pixels of the picture for one of the page
  all: { type: 'boolean', default: false },
};
const NUMBERS = ['minutes', 'scrape', 'width', 'scale'];

function given() {
  try {
    const { values } = parseArgs({ options: OPTIONS });
    const wrong = NUMBERS.find((name) => !(Number(values[name]) > 0));
    if (wrong) throw new Error(`--${wrong} is ${values[wrong]}, and must be a number above 0`);
    return values;
  } catch (error) {
    console.error(`error: ${error.message}`);
    process.exit(64);
  }
}

const options = given();
const KINDS = ['timeseries', 'stat', 'bargauge', ...(parseInt(options.grafana) < 12 ? [] : ['table'])];
const react = parseInt(options.grafana) < 13 ? '18.3.1' : '19.2.8';
const PACKAGES = [
  ...['ui', 'data', 'schema'].map((name) => `@grafana/${name}@${options.grafana}`),
  ...[`react@${react}`, `react-dom@${react}`, '@fontsource/inter@5.3.0', 'esbuild@0.28.2'],
];
const [scrape, width] = [Number(options.scrape), Number(options.width)];

function dashboard(name) {
  return JSON.parse(readFileSync(join(here, `../../../k8s/monitoring/grafana/dashboards/${name}.json`), 'utf8'));
}

async function ask(path, fields) {
  const response = await fetch(`${options.url}/api/v1/${path}?${new URLSearchParams(fields)}`).catch((error) => {
    const why = error.cause?.message ?? error.message;
    throw new Error(`no Prometheus answers at ${options.url} (${why}); start one (make monitor), or give --url`);
  });
  const answer = await response.json();
  if (answer.status !== 'success') throw new Error(`${fields.query}: ${answer.error}`);
  return answer.data.result;
}

/** An expression with the dashboard's variables as Grafana fills them in. */
function filled(expression, step) {
  const interval = `${Math.max(4 * scrape, step + scrape)}s`;
  const values = { job: '.+', run: options.run, node: '.+', __rate_interval: interval };
  return expression.replace(/\$(\w+)/g, (_, name) => values[name]);
}

/** From the first to the last second at which Prometheus knows the run. */
async function timesOfRun() {
  const to = Math.floor(Date.now() / 1000);
  const from = to - Math.round(60 * Number(options.minutes));
  const step = Math.max(scrape, Math.ceil((to - from) / 10000));
  const query = `count(snn_run_info{run=~"${options.run}"})`;
  const [known] = await ask('query_range', { query, start: from, end: to, step });
  if (!known) throw new Error(`${options.url} holds nothing of run '${options.run}' within ${options.minutes} minutes`);
  return { from: known.values[0][0], to: known.values.at(-1)[0] };
}

/** The series of a panel, in ms: over the range, or at its end where the panel wants the newest value alone. */
async function framesOf(panel, box, { from, to }) {
  const frames = [];
  for (const { expr, instant, legendFormat } of panel.targets) {
    const step = Math.max(scrape, Math.ceil((to - from) / (panel.maxDataPoints ?? box.width)));
    const query = filled(expr, step);
    const found = instant
      ? await ask('query', { query, time: to })
      : await ask('query_range', { query, start: from, end: to, step });
    for (const { metric, value, values } of found) {
      const points = values ?? [value];
      const legend = legendFormat.replace(/{{(\w+)}}/g, (_, label) => metric[label] ?? '');
      const times = points.map(([at]) => 1000 * at);
      frames.push({ legend, labels: metric, step: 1000 * step, times, values: points.map(([, value]) => value) });
    }
  }
  return frames;
}

/** Panels from left to right in the sizes of the dashboard, and the height of it all. */
function laidOut(panels) {
  const cell = (width - GAP * (COLUMNS + 1)) / COLUMNS;
  let [x, y, rows] = [0, 0, 0];
  const placed = panels.map((panel) => {
    const { w, h } = panel.gridPos;
    if (x + w > COLUMNS) [x, y, rows] = [0, y + rows, 0];
    const place = { x: GAP + x * (cell + GAP), y: GAP + y * (CELL + GAP) };
    const box = { ...place, width: w * (cell + GAP) - GAP, height: h * (CELL + GAP) - GAP };
    [x, rows] = [x + w, Math.max(rows, h)];
    return { panel, box };
  });
  return { placed, height: GAP + (y + rows) * (CELL + GAP) };
}

/** The panels of each picture, by its file. */
function wanted() {
  if (options.all) {
    const names = ['overview', 'layers', 'data', 'cluster'];
    return names.map((name) => [`${name}.png`, dashboard(name).panels.filter((panel) => KINDS.includes(panel.type))]);
  }
  const pictures = JSON.parse(readFileSync(join(here, 'pictures.json'), 'utf8'));
  const named = (name, title) => {
    const found = dashboard(name).panels.find((panel) => panel.title === title);
    if (!found) throw new Error(`the dashboard ${name} has no panel '${title}'`);
    return found;
  };
  return Object.entries(pictures).map(([file, from]) => {
    return [file, Object.entries(from).flatMap(([name, titles]) => titles.map((title) => named(name, title)))];
  });
}

function installed(folder) {
  if (!existsSync(join(folder, 'node_modules'))) {
    writeFileSync(join(folder, 'package.json'), '{"private": true}');
    const quiet = ['--no-audit', '--no-fund', '--silent', '--fetch-retry-mintimeout=1000', '--fetch-retry-maxtimeout=3000'];
    const words = ['install', '--ignore-scripts', '--legacy-peer-deps', ...quiet];
    try {
      execFileSync('npm', [...words, ...PACKAGES], { cwd: folder, stdio: ['ignore', 'ignore', 'inherit'] });
    } catch (error) {
      throw Object.assign(new Error(`npm cannot install Grafana's packages (${error.message})`), { code: UNAVAILABLE });
    }
  }
  return createRequire(join(folder, 'package.json'));
}

function bundled(require, folder, packages) {
  require('esbuild').buildSync({
    entryPoints: [join(here, 'panels.jsx')],
    outfile: join(folder, 'panels.js'),
    nodePaths: [join(packages, 'node_modules')], // panels.jsx lies elsewhere
    bundle: true,
    minify: true,
    jsx: 'automatic',
    define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
    loader: { '.svg': 'text', '.ttf': 'empty', '.woff': 'empty', '.woff2': 'dataurl' },
    external: ['monaco-editor'], // the editor of queries
    logLevel: 'error',
  });
}

/** A server of the page, the bundle, Grafana's icons and the work; `drawn` gets what the page says of itself. */
function served(folder, packages, work, drawn) {
  const page = `<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="/panels.css">
    <style>.empty { display: grid; place-items: center; height: 100% }</style>
    <div id="root"></div><script src="/panels.js"></script>`;
  const icons = join(packages, 'node_modules/@grafana/ui/dist/public/img/icons');
  const types = { js: 'text/javascript', css: 'text/css', svg: 'image/svg+xml', json: 'application/json' };
  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url, 'http://localhost');
    if (pathname === '/drawn') {
      let said = '';
      for await (const part of request) said += part;
      drawn(JSON.parse(said));
      return response.end();
    }
    const made = { '/': page, '/work.json': JSON.stringify(work) };
    const icon = pathname.match(/^\/public\/build\/img\/icons\/([\w-]+\/[\w-]+\.svg)$/);
    const path = icon ? join(icons, icon[1]) : join(folder, pathname.slice(1));
    const body = made[pathname] ?? (existsSync(path) ? readFileSync(path) : null);
    response.writeHead(body === null ? 404 : 200, { 'content-type': types[pathname.split('.')[1]] ?? 'text/html' });
    response.end(body);
  });
  return new Promise((listening) => server.listen(0, '127.0.0.1', () => listening(server)));
}

async function draw(file, panels, range, folder, packages) {
  const { placed, height } = laidOut(panels);
  for (const one of placed) one.frames = await framesOf(one.panel, one.box, range);
  const said = [];
  const after = 0.05 * (range.to - range.from); // else the last label may be cut
  const shown = { from: 1000 * range.from, to: 1000 * (range.to + after) };
  const work = { theme: options.theme, range: shown, panels: placed };
  const server = await served(folder, packages, work, (one) => said.push(one));
  const path = resolve(options.out, file);
  mkdirSync(options.out, { recursive: true });
  rmSync(path, { force: true });
  const words = [
    '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', `--user-data-dir=${join(folder, 'profile')}`,
    `--window-size=${width},${height}`, `--force-device-scale-factor=${options.scale}`, '--virtual-time-budget=10000',
    `--screenshot=${path}`, `http://127.0.0.1:${server.address().port}/`,
  ];
  try {
    await promisify(execFile)(options.chromium, words, { timeout: 60000 });
  } finally {
    server.close();
    server.closeAllConnections();
  }
  const wrong = said.find((one) => one.error)?.error ?? (said.length && existsSync(path) ? null : 'its panels were not drawn');
  if (wrong) throw new Error(`${file}: ${wrong}`);
  console.log(`${path}: ${placed.length} panels, ${said[0].curves} with curves`);
}

const folder = mkdtempSync(join(tmpdir(), 'grafana-pictures-'));
try {
  const packages = options.packages ? resolve(options.packages) : folder;
  mkdirSync(packages, { recursive: true });
  const range = await timesOfRun();
  bundled(installed(packages), folder, packages);
  for (const [file, panels] of wanted()) await draw(file, panels, range, folder, packages);
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = error.code === UNAVAILABLE ? UNAVAILABLE : 1;
} finally {
  rmSync(folder, { recursive: true, force: true });
}

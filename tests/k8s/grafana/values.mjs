// Writes values.json, what every listed version of Grafana allows in a dashboard:  node tests/k8s/grafana/values.mjs
// It needs node 18 and npm, and takes a few minutes: it installs Grafana's published packages into a temporary folder.
//
// From @grafana/schema it takes the types of a dashboard and of the options of every panel, from @grafana/data the
// colour schemes, units, reducers and transformations that are registered. What a version lacks is left out. A type is
// "any", "string", "number", "boolean", "null", {enum: values}, {list: type}, {fields: types by name} or {either: types}.
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const VERSIONS = ['11.6.16', '12.0.2', '12.3.3', '12.4.10', '13.2.3'];
const DEPTH = 12; // of nested types; a dashboard has eight

const root = mkdtempSync(join(tmpdir(), 'grafana-values-'));

/** A folder with these packages from npm; the versions of one package need a folder each. */
function installed(name, packages) {
  const folder = join(root, name);
  mkdirSync(folder);
  writeFileSync(join(folder, 'package.json'), '{"private": true}');
  const words = ['install', '--ignore-scripts', '--legacy-peer-deps', '--no-audit', '--no-fund', '--silent'];
  execFileSync('npm', [...words, ...packages], { cwd: folder, stdio: ['ignore', 'ignore', 'inherit'] });
  return folder;
}

const tools = createRequire(join(installed('tools', ['typescript@5.9', 'jsdom@24.1']), 'package.json'));
const ts = tools('typescript');

/** The folder of a panel's types by the panel's name without dashes: @grafana/schema moved them more than once. */
function panelTypes(folder) {
  const schema = join(folder, 'node_modules/@grafana/schema/dist/esm/raw/composable');
  const found = {};
  for (const panel of readdirSync(schema)) {
    const files = readdirSync(join(schema, panel), { recursive: true }).map(String);
    const file = files.find((one) => /PanelCfg_types\.gen\.d\.ts$/.test(one));
    if (file) {
      found[panel] = join(schema, panel, file.replace(/\.d\.ts$/, '')); // by its path: not every version exports it
    }
  }
  return found;
}

function typesOf(folder) {
  // Apart, since in 11.6 the compiler loses the dashboard's fields beside those of the panels.
  const dashboard = shapesOf(folder, ["import { Dashboard } from '@grafana/schema';", 'export type dashboard = Dashboard;']);
  if (!dashboard.dashboard.fields?.panels) throw new Error(`${folder}: the types of @grafana/schema cannot be read`);
  return { dashboard: dashboard.dashboard, ...panelsOf(folder) };
}

function panelsOf(folder) {
  const panels = panelTypes(folder);
  const lines = [];
  for (const [panel, file] of Object.entries(panels)) {
    lines.push(`import * as ${panel}Types from '${file}';`);
    lines.push(`export type ${panel}_options = ${panel}Types.Options;`);
    lines.push(`export type ${panel}_custom = ${panel}Types.FieldConfig;`);
  }
  return { panels: shapesOf(folder, lines).panels };
}

/** The shapes of the types that these lines of TypeScript export. */
function shapesOf(folder, lines) {
  const path = join(folder, 'roots.ts');
  writeFileSync(path, lines.join('\n'));
  const options = { moduleResolution: ts.ModuleResolutionKind.Bundler, module: ts.ModuleKind.ESNext, strict: true };
  const program = ts.createProgram([path], { ...options, skipLibCheck: true, noEmit: true, types: [] });
  const checker = program.getTypeChecker();

  function shape(type, depth) {
    if (depth > DEPTH || type.flags & (ts.TypeFlags.Any | ts.TypeFlags.Unknown)) return 'any';
    if (type.isUnion()) {
      const members = type.types.filter((one) => !(one.flags & ts.TypeFlags.Undefined));
      const values = members.filter((one) => one.isLiteral()).map((one) => one.value);
      const rest = members.filter((one) => !one.isLiteral()).map((one) => shape(one, depth + 1));
      const either = [...(values.length ? [{ enum: values.sort() }] : []), ...rest];
      const different = [...new Map(either.map((one) => [JSON.stringify(one), one])).values()];
      if (different.includes('any')) return 'any';
      return different.length === 1 ? different[0] : { either: different };
    }
    if (type.isLiteral()) return { enum: [type.value] };
    if (type.flags & ts.TypeFlags.StringLike) return 'string';
    if (type.flags & ts.TypeFlags.NumberLike) return 'number';
    if (type.flags & ts.TypeFlags.BooleanLike) return 'boolean';
    if (type.flags & ts.TypeFlags.Null) return 'null';
    if (checker.isArrayType(type)) return { list: shape(checker.getTypeArguments(type)[0], depth + 1) };
    const fields = {};
    const open = checker.getIndexInfosOfType(type).length > 0;
    for (const property of checker.getPropertiesOfType(type)) {
      fields[property.name] = shape(checker.getTypeOfSymbol(property), depth + 1);
    }
    return open ? 'any' : { fields };
  }

  const roots = { panels: {} };
  for (const symbol of checker.getExportsOfModule(checker.getSymbolAtLocation(program.getSourceFile(path)))) {
    const [name, kind] = symbol.name.split('_');
    const type = checker.getDeclaredTypeOfSymbol(symbol);
    if (!kind) roots.dashboard = shape(type, 0);
    // A panel without options or fields of its own has no such type.
    else (roots.panels[name] ??= {})[kind] = type.intrinsicName === 'error' ? { fields: {} } : shape(type, 0);
  }
  return roots;
}

/** What @grafana/data registers; it wants to be in a browser. */
function registriesOf(folder) {
  const script = `
    const { createRequire } = require('node:module');
    const { JSDOM } = createRequire(${JSON.stringify(join(root, 'tools/package.json'))})('jsdom');
    const { window } = new JSDOM('', { url: 'http://localhost/' });
    for (const name of Object.getOwnPropertyNames(window)) if (!(name in globalThis)) globalThis[name] = window[name];
    globalThis.window = window;
    const said = console.log;
    console.log = console.info = () => {};
    const data = require('@grafana/data');
    const ids = (list) => list.map((one) => one.id).sort();
    said(JSON.stringify({
      colors: ids(data.fieldColorModeRegistry.list()),
      reducers: ids(data.fieldReducers.list()),
      transformations: ids(Object.values(data.standardTransformers)),
      units: data.getValueFormats().flatMap((group) => group.submenu.map((one) => one.value)).sort(),
    }));`;
  const words = ['-e', script];
  return JSON.parse(execFileSync(process.execPath, words, { cwd: folder, maxBuffer: 1e8, encoding: 'utf8' }));
}

/** What both types allow. */
function common(one, other) {
  if (one === 'any') return other;
  if (other === 'any' || JSON.stringify(one) === JSON.stringify(other)) return one;
  const both = (key) => one[key] !== undefined && other[key] !== undefined;
  if (both('enum')) return { enum: one.enum.filter((value) => other.enum.includes(value)) };
  if (both('list')) return { list: common(one.list, other.list) };
  if (both('fields')) {
    const names = Object.keys(one.fields).filter((name) => name in other.fields);
    return { fields: Object.fromEntries(names.map((name) => [name, common(one.fields[name], other.fields[name])])) };
  }
  if (one.either || other.either) {
    const kind = (type) => (typeof type === 'string' ? type : Object.keys(type)[0]);
    const others = other.either ?? [other];
    const pairs = (one.either ?? [one]).map((mine) => [mine, others.find((theirs) => kind(theirs) === kind(mine))]);
    const left = pairs.filter(([, theirs]) => theirs).map(([mine, theirs]) => common(mine, theirs));
    return left.length === 1 ? left[0] : { either: left };
  }
  return { either: [] };
}

function commonLists(one, other) {
  return Object.fromEntries(Object.keys(one).map((key) => [key, one[key].filter((id) => other[key].includes(id))]));
}

function commonPanels(one, other) {
  const names = Object.keys(one).filter((name) => name in other);
  const kinds = (name) => ['options', 'custom'].map((kind) => [kind, common(one[name][kind], other[name][kind])]);
  return Object.fromEntries(names.map((name) => [name, Object.fromEntries(kinds(name))]));
}

try {
  let types, lists;
  for (const version of VERSIONS) {
    const packages = ['schema', 'data'].map((name) => `@grafana/${name}@${version}`);
    const folder = installed(version, [...packages, 'react@18', 'react-dom@18', 'rxjs@7']);
    const [mine, registered] = [typesOf(folder), registriesOf(folder)];
    lists = lists ? commonLists(lists, registered) : registered;
    types = types
      ? { dashboard: common(types.dashboard, mine.dashboard), panels: commonPanels(types.panels, mine.panels) }
      : mine;
    console.error(`${version}: ${registered.colors.length} colour schemes, ${Object.keys(mine.panels).length} panels`);
  }
  const used = ['bargauge', 'stat', 'statetimeline', 'statushistory', 'table', 'timeseries'];
  types.panels = Object.fromEntries(used.map((name) => [name, types.panels[name]]));
  const text = JSON.stringify({ versions: VERSIONS, ...lists, ...types }, null, 1);
  // A list of words on one line.
  const short = text.replace(/\[\s+((?:"[^"]*"|-?\d+)(?:,\s+(?:"[^"]*"|-?\d+))*)\s+\]/g, (_, words) => {
    return `[${words.replace(/\s*\n\s*/g, ' ')}]`;
  });
  writeFileSync(new URL('values.json', import.meta.url), `${short}\n`);
} finally {
  rmSync(root, { recursive: true, force: true });
}

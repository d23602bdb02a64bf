// Draws panels of a dashboard with Grafana's own components, in a browser; pictures.mjs bundles and opens it.
//
// It reads /work.json: {theme, range: {from, to} in ms, width, panels: [{panel, box, frames}]}; `panel` is of the
// dashboard's file, `box` its place in pixels, and a frame {legend, labels, step, times, values}. What the panels'
// plugins would add, since only Grafana's server brings those, stands in DEFAULTS: the values of a new panel's options.
import '@fontsource/inter/400.css';
import '@fontsource/inter/500.css';
import 'uplot/dist/uPlot.min.css';
import {
  applyFieldOverrides, createTheme, dateTime, FieldConfigOptionsRegistry, FieldType, getDisplayValueAlignmentFactors,
  getFieldDisplayValues, identityOverrideProcessor, standardTransformers, ThemeContext, toDataFrame,
} from '@grafana/data';
import { BarGauge, BigValue, GlobalStyles, PanelChrome, TimeSeries, VizRepeater } from '@grafana/ui';
import * as unstable from '@grafana/ui/unstable'; // has TableNG from Grafana 12 on
import { createRoot } from 'react-dom/client';
import { of } from 'rxjs';

const DEFAULTS = {
  curve: { drawStyle: 'line', lineWidth: 1, fillOpacity: 0, gradientMode: 'none', showPoints: 'auto', pointSize: 5 },
  legend: { showLegend: true, displayMode: 'list', placement: 'bottom', calcs: [] },
  bars: { itemSpacing: 10, minVizWidth: 8, minVizHeight: 16, maxVizHeight: 300 },
  reduce: { values: false, calcs: ['lastNotNull'], fields: '' },
};
const same = (text) => text; // no variable is left to fill in

/** The properties that a panel's overrides name; Grafana's server has one with all that there are. */
function overridable({ overrides }) {
  const ids = new Set(overrides.flatMap(({ properties }) => properties.map(({ id }) => id)));
  const common = { process: identityOverrideProcessor, shouldApply: () => true };
  return new FieldConfigOptionsRegistry(() => [...ids].map((id) => {
    const path = id.replace(/^custom\./, '');
    return { id, path, isCustom: path !== id, ...common };
  }));
}

/** Data frames as Grafana's Prometheus source makes them, with the panel's settings on every number. */
function dataFrames(panel, frames, theme) {
  const defaults = panel.fieldConfig.defaults;
  const custom = { ...DEFAULTS.curve, ...defaults.custom };
  const data = panel.type === 'table' ? rows(panel, frames) : frames.map(({ legend, labels, step, times, values }) => {
    const number = { ...defaults, custom, ...(legend ? { displayNameFromDS: legend } : {}) };
    return toDataFrame({
      fields: [
        { name: 'Time', type: FieldType.time, values: times, config: { interval: step } },
        { name: 'Value', type: FieldType.number, labels, values: values.map(Number), config: number },
      ],
    });
  });
  const { fieldConfig } = panel;
  const fieldConfigRegistry = overridable(fieldConfig);
  const context = { fieldConfig, fieldConfigRegistry, replaceVariables: same, theme, timeZone: 'utc' };
  return applyFieldOverrides({ data, ...context });
}

/** One frame with a row for each series: its time, its labels and its value, less what the panel leaves out. */
function rows({ fieldConfig: { defaults }, transformations }, frames) {
  if (!frames.length) return [];
  const names = [...new Set(frames.flatMap(({ labels }) => Object.keys(labels)))].sort();
  const whole = toDataFrame({
    fields: [
      { name: 'Time', type: FieldType.time, values: frames.map(({ times }) => times[0]), config: {} },
      ...names.map((name) => {
        return { name, type: FieldType.string, values: frames.map(({ labels }) => labels[name] ?? ''), config: defaults };
      }),
      { name: 'Value', type: FieldType.number, values: frames.map(({ values }) => Number(values[0])), config: defaults },
    ],
  });
  let left = of([whole]);
  for (const { id, options } of transformations) {
    const { operator } = Object.values(standardTransformers).find((one) => one.id === id);
    left = left.pipe(operator(options, { interpolate: same }));
  }
  let found = [];
  left.subscribe((one) => { found = one; });
  return found;
}

function table(panel, data, { width, height }) {
  return <unstable.TableNG data={data[0]} {...{ width, height }} />;
}

function timeseries({ options }, data, { range, width, height }) {
  const legend = { ...DEFAULTS.legend, ...options.legend };
  return <TimeSeries frames={data} structureRev={1} timeRange={range} timeZone="utc" {...{ legend, width, height }} />;
}

function displayed(panel, data, theme) {
  const { fieldConfig, options } = panel;
  const reduceOptions = { ...DEFAULTS.reduce, ...options.reduceOptions };
  return getFieldDisplayValues({ data, fieldConfig, reduceOptions, replaceVariables: same, theme, timeZone: 'utc' });
}

function stat(panel, data, { theme, width, height }) {
  const { colorMode = 'value', graphMode = 'area', textMode = 'auto', orientation = 'auto' } = panel.options;
  const modes = { colorMode, graphMode, textMode };
  const one = ({ value, width, height, count, alignmentFactors }) => (
    <BigValue value={value.display} {...{ theme, width, height, count, alignmentFactors, ...modes }} />
  );
  return (
    <VizRepeater getValues={() => displayed(panel, data, theme)} getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={one} source={data} renderCounter={0} autoGrid {...{ width, height, orientation }} />
  );
}

function bargauge(panel, data, { theme, width, height }) {
  const { orientation = 'auto', displayMode = 'gradient', showUnfilled = true } = panel.options;
  const one = ({ value, width, height, orientation, alignmentFactors }) => (
    <BarGauge value={value.display} field={value.field} display={value.view?.getFieldDisplayProcessor(value.colIndex)}
      {...{ theme, width, height, orientation, displayMode, showUnfilled, alignmentFactors }} />
  );
  return (
    <VizRepeater getValues={() => displayed(panel, data, theme)} getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={one} source={data} renderCounter={0} {...DEFAULTS.bars} {...{ width, height, orientation }} />
  );
}

const KINDS = { timeseries, stat, bargauge, table };

function Panel({ panel, box, frames, theme, range }) {
  const data = dataFrames(panel, frames, theme);
  const { title, description, type } = panel;
  const draw = (width, height) =>
    data.length ? KINDS[type](panel, data, { theme, range, width, height }) : <div className="empty">No data</div>;
  return (
    <div style={{ position: 'absolute', left: box.x, top: box.y }}>
      <PanelChrome {...{ title, description, width: box.width, height: box.height }}>{draw}</PanelChrome>
    </div>
  );
}

async function main() {
  const work = await (await fetch('/work.json')).json();
  const theme = createTheme({ colors: { mode: work.theme } });
  const [from, to] = [dateTime(work.range.from), dateTime(work.range.to)];
  const range = { from, to, raw: { from, to } };
  await Promise.all(['400', '500'].map((weight) => document.fonts.load(`${weight} 12px Inter`))); // for the canvases
  document.body.style.background = theme.colors.background.canvas;
  const root = createRoot(document.getElementById('root'), { onUncaughtError: report });
  root.render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      {work.panels.map((one) => <Panel key={one.panel.id} {...{ ...one, theme, range }} />)}
    </ThemeContext.Provider>,
  );
  const curves = work.panels.filter(({ panel, frames }) => panel.type === 'timeseries' && frames.length).length;
  const waiting = setInterval(() => {
    if (document.querySelectorAll('canvas').length < curves) return;
    clearInterval(waiting);
    say({ curves });
  }, 100);
}

function say(what) {
  return fetch('/drawn', { method: 'POST', body: JSON.stringify(what) });
}

function report(error) {
  say({ error: `${error?.stack ?? error}` });
}

window.addEventListener('error', (event) => report(event.error ?? event.message));
window.addEventListener('unhandledrejection', (event) => report(event.reason));
main();

//! The report: samples by contender, ratios by round, as tables and as JSON.
//!
//! A ratio compares two contenders' samples of the same round. They are taken within the same
//! minute, so that other load on the machine affects both. The report shows the median of the
//! rounds, with minimum and maximum.

use comfy_table::{Table, presets};
use serde_json::{Value, json};

/// One run of one contender.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample {
    /// Events per second.
    pub(crate) rate: Option<f64>,
    pub(crate) p50_us: Option<f64>,
    pub(crate) p99_us: Option<f64>,
    /// The time until the 200, where the other two are the time until the signal.
    pub(crate) answer_p50_us: Option<f64>,
    pub(crate) answer_p99_us: Option<f64>,
    /// Signals that had not arrived when the last 200 did.
    pub(crate) behind: Option<f64>,
    /// CPU seconds per 10,000 events.
    pub(crate) cpu_s: Option<f64>,
    /// CPU seconds of ingress per 10,000 events, where the one above is ingress and worker.
    pub(crate) ingress_cpu_s: Option<f64>,
    /// CPU seconds of the broker per 10,000 events.
    pub(crate) broker_cpu_s: Option<f64>,
    /// CPU seconds of PostgreSQL per 10,000 events. SQLite is part of the program.
    pub(crate) database_cpu_s: Option<f64>,
    /// Peak memory.
    pub(crate) memory_mib: Option<f64>,
    /// CPU of one core, in percent.
    pub(crate) cpu_percent: Option<f64>,
    /// Instructions per event.
    pub(crate) instructions: Option<f64>,
}

impl Sample {
    /// CPU seconds of all server programs per 10,000 events.
    pub(crate) fn all_cpu_s(&self) -> Option<f64> {
        Some(self.cpu_s? + self.broker_cpu_s? + self.database_cpu_s?)
    }
}

/// A column of a sample.
pub(crate) type Column = fn(&Sample) -> Option<f64>;

const COLUMNS: [(&str, Column); 13] = [
    ("events_per_s", |sample| sample.rate),
    ("p50_us", |sample| sample.p50_us),
    ("p99_us", |sample| sample.p99_us),
    ("answer_p50_us", |sample| sample.answer_p50_us),
    ("answer_p99_us", |sample| sample.answer_p99_us),
    ("behind", |sample| sample.behind),
    ("cpu_s_per_10k", |sample| sample.cpu_s),
    ("ingress_cpu_s_per_10k", |sample| sample.ingress_cpu_s),
    ("broker_cpu_s_per_10k", |sample| sample.broker_cpu_s),
    ("database_cpu_s_per_10k", |sample| sample.database_cpu_s),
    ("memory_mib", |sample| sample.memory_mib),
    ("cpu_percent", |sample| sample.cpu_percent),
    ("instructions", |sample| sample.instructions),
];

/// The bound that a figure has to keep.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(bound) => format!("≥ {bound}"),
            Self::AtMost(bound) => format!("≤ {bound}"),
        }
    }
}

/// The samples and figures that answer one question.
pub(crate) struct Measurement {
    name: &'static str,
    question: &'static str,
    contenders: Vec<(String, Vec<Sample>)>,
    figures: Vec<Figure>,
}

/// A figure with one value per round.
struct Figure {
    what: String,
    rounds: Vec<f64>,
    target: Option<Target>,
}

impl Measurement {
    pub(crate) fn new(name: &'static str, question: &'static str) -> Self {
        Self {
            name,
            question,
            contenders: Vec::new(),
            figures: Vec::new(),
        }
    }

    /// Adds the sample of one run of `contender`.
    pub(crate) fn add(&mut self, contender: &str, sample: Sample) {
        match self
            .contenders
            .iter_mut()
            .find(|(name, _)| name == contender)
        {
            Some((_, samples)) => samples.push(sample),
            None => self.contenders.push((contender.to_owned(), vec![sample])),
        }
    }

    /// Adds the figure `what`: the ratio of `column` between two contenders, by round.
    pub(crate) fn add_ratio(
        &mut self,
        what: &str,
        of: &str,
        to: &str,
        column: Column,
        target: Option<Target>,
    ) {
        let pairs = self.samples(of).iter().zip(self.samples(to));
        let rounds = pairs
            .filter_map(|(of, to)| Some(column(of)? / column(to)?))
            .filter(|ratio| ratio.is_finite());
        let rounds: Vec<f64> = rounds.collect();
        self.figures.push(Figure {
            what: format!("{what}: {of} ÷ {to}"),
            rounds,
            target,
        });
    }

    /// Adds the figure `what`: a contender's `column`, compared with a target.
    pub(crate) fn add_bound(&mut self, what: &str, of: &str, column: Column, target: Target) {
        let rounds = self.samples(of).iter().filter_map(column).collect();
        self.figures.push(Figure {
            what: format!("{what}: {of}"),
            rounds,
            target: Some(target),
        });
    }

    fn samples(&self, of: &str) -> &[Sample] {
        self.contenders
            .iter()
            .find(|(name, _)| name == of)
            .map_or(&[], |(_, samples)| samples)
    }

    /// Returns two tables: the samples, and the figures with their targets.
    pub(crate) fn tables(&self) -> String {
        let shown = |column: Column| {
            self.contenders
                .iter()
                .any(|(_, samples)| samples.iter().any(|sample| column(sample).is_some()))
        };
        let columns: Vec<_> = COLUMNS
            .into_iter()
            .filter(|(_, column)| shown(*column))
            .collect();
        let mut measured = table();
        measured.set_header(std::iter::once("").chain(columns.iter().map(|(name, _)| *name)));
        for (name, samples) in &self.contenders {
            let cell = |column: Column| {
                let values: Vec<f64> = samples.iter().filter_map(column).collect();
                Spread::from_values(&values).map_or_else(String::new, |spread| spread.text())
            };
            measured.add_row(
                std::iter::once(name.clone())
                    .chain(columns.iter().map(|(_, column)| cell(*column))),
            );
        }
        if self.figures.is_empty() {
            return format!("\n## {}\n{}\n\n{measured}", self.name, self.question);
        }
        let mut compared = table();
        compared.set_header(["", "median (min–max)", "target", ""]);
        for figure in &self.figures {
            let (text, mark) = match Spread::from_values(&figure.rounds) {
                Some(spread) => (spread.text(), figure.verdict(spread.median)),
                None => ("–".to_owned(), ""),
            };
            let target = figure.target.map(Target::text).unwrap_or_default();
            compared.add_row([figure.what.clone(), text, target, mark.to_owned()]);
        }
        format!(
            "\n## {}\n{}\n\n{measured}\n\n{compared}",
            self.name, self.question
        )
    }

    pub(crate) fn json(&self) -> Value {
        let contender = |(name, samples): &(String, Vec<Sample>)| {
            let figures = COLUMNS.into_iter().filter_map(|(column, value)| {
                let values: Vec<f64> = samples.iter().filter_map(value).collect();
                Some((column.to_owned(), Spread::from_values(&values)?.json()))
            });
            (name.clone(), Value::Object(figures.collect()))
        };
        let figure = |figure: &Figure| {
            let spread = Spread::from_values(&figure.rounds);
            json!({
                "what": figure.what,
                "value": spread.map(Spread::json),
                "target": figure.target.map(Target::text),
                "met": figure.target.zip(spread).map(|(target, spread)| target.is_met(spread.median)),
            })
        };
        json!({
            "name": self.name,
            "question": self.question,
            "measured": Value::Object(self.contenders.iter().map(contender).collect()),
            "compared": self.figures.iter().map(figure).collect::<Vec<_>>(),
        })
    }
}

impl Figure {
    fn verdict(&self, median: f64) -> &'static str {
        match self.target {
            Some(target) if target.is_met(median) => "met",
            Some(_) => "MISSED",
            None => "",
        }
    }
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table
}

/// The median of some values, with the smallest and the largest.
#[derive(Clone, Copy)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn from_values(values: &[f64]) -> Option<Self> {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Some(Self { median, min, max })
    }

    fn text(self) -> String {
        if self.min == self.max {
            return short(self.median);
        }
        format!(
            "{} ({}–{})",
            short(self.median),
            short(self.min),
            short(self.max)
        )
    }

    fn json(self) -> Value {
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        json!({ "median": rounded(self.median), "min": rounded(self.min), "max": rounded(self.max) })
    }
}

/// Writes a figure with only as many digits as are meaningful.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

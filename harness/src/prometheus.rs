//! A real Prometheus on 127.0.0.1, with its own port and folder, that scrapes our programs and
//! evaluates the rules of `deploy/prometheus`.
//!
//! An alert fires after seconds: every `for` of the rules is shortened. Their ranges and thresholds
//! are as shipped.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{self, Process};
use crate::{eventually, port, stripe, tools};

const RULES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../deploy/prometheus/rules.yml"
);

/// The `for` of all alerts, in seconds. An alert that is silent because of a figure of another program
/// has to wait for it: ingress notices a frozen broker up to 4 s before the worker, and a scrape and an
/// evaluation follow.
pub const FOR_S: u32 = 10;

const START_DEADLINE: Duration = Duration::from_secs(60);

/// A running Prometheus. Dropping it kills it and removes its folder.
#[derive(Debug)]
pub struct Prometheus {
    // Declared first, so that the process has ended before its folder is removed.
    process: Process,
    url: String,
    http: reqwest::Client,
    /// Since when all programs are scraped.
    since: Instant,
    _folder: TempDir,
}

/// A rule.
#[derive(Debug)]
pub struct Rule {
    /// Whether it makes alerts; otherwise it records figures.
    pub is_alert: bool,
    pub expression: String,
    /// Why the last evaluation failed, or an empty text.
    pub error: String,
}

impl Prometheus {
    /// Starts one that scrapes these programs every second, each a URL. Waits until it has
    /// scraped all of them and no alert is pending: at first it knows of no program.
    ///
    /// # Panics
    /// When there is no Prometheus, or it does not start; the message contains its log.
    pub async fn start(targets: &[&str]) -> Self {
        let program = tools::prometheus().expect("scripts/test leaves the test out without it");
        let folder = tempfile::Builder::new()
            .prefix("litestripe-prometheus-")
            .tempdir()
            .expect("a folder for Prometheus can be made");
        write_config(folder.path(), targets);
        let address = format!("127.0.0.1:{}", port::free());
        let mut command = process::command(program, process::Signal::Kill);
        command
            .current_dir(folder.path())
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data"])
            .arg(format!("--web.listen-address={address}"));
        let mut prometheus = Self {
            process: Process::spawn("prometheus", command, None).expect("it can be started"),
            url: format!("http://{address}"),
            http: stripe::client(),
            since: Instant::now(),
            _folder: folder,
        };
        let count = targets.len();
        eventually("Prometheus to scrape all", START_DEADLINE, async || {
            let log = prometheus.process.log();
            assert!(prometheus.process.is_running(), "it ended:\n{log}");
            let up = prometheus.query("sum(up)").await?;
            let alerts = prometheus.alerts("ALERTS").await?;
            let is_up = up.first().is_some_and(|(_, up)| up.parse() == Ok(count));
            match is_up && alerts.is_empty() {
                true => Ok(()),
                false => Err(format!("{up:?} of {count} are up, {alerts:?}:\n{log}")),
            }
        })
        .await;
        prometheus.since = Instant::now();
        prometheus
    }

    async fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, String> {
        let get = self.http.get(format!("{}{path}", self.url)).query(query);
        let answer = get.send().await.map_err(|error| error.to_string())?;
        let answer: Value = answer.json().await.map_err(|error| error.to_string())?;
        match &answer["status"] {
            Value::String(status) if status == "success" => Ok(answer["data"].clone()),
            _ => Err(format!("{query:?}: {answer}")),
        }
    }

    /// Returns the rules as it has read them.
    ///
    /// # Errors
    /// Prometheus does not answer.
    pub async fn rules(&self) -> Result<Vec<Rule>, String> {
        let found = self.get("/api/v1/rules", &[]).await?;
        let groups = found["groups"].as_array().into_iter().flatten();
        let rules = groups.flat_map(|group| group["rules"].as_array().into_iter().flatten());
        let rule = |rule: &Value| Rule {
            is_alert: rule["type"] == "alerting",
            expression: rule["query"].as_str().unwrap_or_default().to_owned(),
            error: rule["lastError"].as_str().unwrap_or_default().to_owned(),
        };
        Ok(rules.map(rule).collect())
    }

    /// Evaluates an expression now. Returns the labels and the value of each series.
    ///
    /// # Errors
    /// Prometheus does not answer or refuses the expression.
    pub async fn query(&self, expression: &str) -> Result<Vec<(Value, String)>, String> {
        let found = self.get("/api/v1/query", &[("query", expression)]).await?;
        let series = found["result"].as_array().into_iter().flatten();
        let value = |series: &Value| series["value"][1].as_str().unwrap_or_default().to_owned();
        Ok(series
            .map(|series| (series["metric"].clone(), value(series)))
            .collect())
    }

    /// Returns the alerts that `expression` selects from `ALERTS`, each as `name severity`.
    ///
    /// # Errors
    /// As [`Prometheus::query`].
    pub async fn alerts(&self, expression: &str) -> Result<Vec<String>, String> {
        let series = self.query(expression).await?;
        let text =
            |labels: &Value, name: &str| labels[name].as_str().unwrap_or_default().to_owned();
        let mut alerts: Vec<_> = series
            .iter()
            .map(|(labels, _)| {
                format!("{} {}", text(labels, "alertname"), text(labels, "severity"))
            })
            .collect();
        alerts.sort();
        alerts.dedup();
        Ok(alerts)
    }

    /// Returns all alerts that have fired since the start, each as `name severity`.
    ///
    /// # Errors
    /// As [`Prometheus::query`].
    pub async fn fired(&self) -> Result<Vec<String>, String> {
        let seconds = self.since.elapsed().as_secs().max(1);
        let fired = format!("count_over_time(ALERTS{{alertstate=\"firing\"}}[{seconds}s])");
        self.alerts(&fired).await
    }

    /// Waits until the rules were evaluated this many more times.
    pub async fn wait_for_evaluations(&self, count: u32) {
        const EVALUATIONS: &str =
            "count_over_time(installation:litestripe_worker_waiting:sum{for=\"broker\"}[1h])";
        let mut end = None;
        eventually("evaluations of the rules", START_DEADLINE, async || {
            let found = self.query(EVALUATIONS).await?;
            let now: f64 = found
                .first()
                .and_then(|of| of.1.parse().ok())
                .unwrap_or(0.0);
            let end = *end.get_or_insert(now + f64::from(count));
            if now < end {
                Err(format!("{now} of {end}"))
            } else {
                Ok(())
            }
        })
        .await;
    }
}

fn write_config(folder: &Path, targets: &[&str]) {
    let rules = fs::read_to_string(RULES).expect("the rules can be read");
    let shortened: Vec<String> = rules
        .lines()
        .map(|line| match line.trim_start().starts_with("for: ") {
            true => format!(
                "{}for: {FOR_S}s",
                &line[..line.len() - line.trim_start().len()]
            ),
            false => line.to_owned(),
        })
        .collect();
    fs::write(folder.join("rules.yml"), shortened.join("\n")).expect("the rules can be written");
    let targets: Vec<_> = targets
        .iter()
        .map(|url| format!("'{}'", url.trim_start_matches("http://")))
        .collect();
    let config = format!(
        "global: {{ scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s }}\n\
         rule_files: [rules.yml]\n\
         scrape_configs:\n\
         - job_name: litestripe\n  static_configs: [{{ targets: [{}] }}]\n",
        targets.join(", ")
    );
    fs::write(folder.join("prometheus.yml"), config).expect("the configuration can be written");
}

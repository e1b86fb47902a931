//! A collector of traces: receives spans by OTLP over HTTP, as protobuf.
//!
//! Owns decoding what our programs send. May not know what the spans are for.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1 as otlp;
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use warp::Filter as _;
use warp::http::HeaderMap;

use crate::eventually;

/// The programs send spans after [`SCHEDULE_DELAY_MS`], or when they stop.
const DEADLINE: Duration = Duration::from_secs(60);

/// How soon the programs of a test send their spans.
const SCHEDULE_DELAY_MS: &str = "100";

/// A running collector. Dropping it closes its port.
#[derive(Debug)]
pub struct Collector {
    port: u16,
    received: Arc<Mutex<Received>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Received {
    spans: Vec<Span>,
    requests: Vec<(HeaderMap, Bytes)>,
}

/// The ids of a span, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids {
    pub trace: String,
    pub span: String,
}

/// A span as the collector received it.
#[derive(Debug, Clone)]
pub struct Span {
    pub service: String,
    pub name: String,
    pub kind: otlp::span::SpanKind,
    pub ids: Ids,
    /// Empty for the first span of a trace.
    pub parent: String,
    pub tracestate: String,
    pub links: Vec<Ids>,
    pub attributes: BTreeMap<String, String>,
    pub is_error: bool,
}

impl Collector {
    /// Starts a collector on a free port.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let received = Arc::<Mutex<Received>>::default();
        let store = Arc::clone(&received);
        let traces = warp::post()
            .and(warp::path!("v1" / "traces"))
            .and(warp::header::headers_cloned())
            .and(warp::body::bytes())
            .map(move |headers, body| {
                let mut received = store.lock().unwrap_or_else(PoisonError::into_inner);
                received.add(headers, body);
                ""
            });
        Self {
            port,
            received,
            task: tokio::spawn(warp::serve(traces).incoming(listener).run()),
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The settings with which a program sends its spans here soon.
    pub fn settings(&self) -> [(&'static str, String); 2] {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
            ("OTEL_BSP_SCHEDULE_DELAY", SCHEDULE_DELAY_MS.to_owned()),
        ]
    }

    /// Everything that was received, with the headers of each request.
    pub fn requests(&self) -> Vec<(HeaderMap, Bytes)> {
        self.received().requests.clone()
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Span> {
        self.received().spans.clone()
    }

    /// Waits for a span and returns it.
    #[track_caller]
    pub fn span(&self, what: &str, is: impl Fn(&Span) -> bool) -> impl Future<Output = Span> {
        eventually(what, DEADLINE, async move || {
            let spans = self.spans();
            let found = spans.iter().find(|span| is(span)).cloned();
            found.ok_or_else(|| format!("{spans:#?}"))
        })
    }

    fn received(&self) -> MutexGuard<'_, Received> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Received {
    fn add(&mut self, headers: HeaderMap, body: Bytes) {
        let request = ExportTraceServiceRequest::decode(body.clone()).expect("it is OTLP");
        for of_resource in request.resource_spans {
            let resource = of_resource.resource.unwrap_or_default();
            let resource = attributes(&resource.attributes);
            let spans = of_resource.scope_spans.into_iter();
            let spans = spans.flat_map(|of_scope| of_scope.spans);
            self.spans
                .extend(spans.map(|span| Span::new(span, &resource)));
        }
        self.requests.push((headers, body));
    }
}

impl Span {
    fn new(span: otlp::Span, resource: &BTreeMap<String, String>) -> Self {
        let link = |link: &otlp::span::Link| Ids::new(&link.trace_id, &link.span_id);
        let code = |status: otlp::Status| status.code();
        Self {
            service: resource.get("service.name").cloned().unwrap_or_default(),
            kind: span.kind(),
            ids: Ids::new(&span.trace_id, &span.span_id),
            parent: hex(&span.parent_span_id),
            links: span.links.iter().map(link).collect(),
            attributes: attributes(&span.attributes),
            is_error: span.status.map(code) == Some(otlp::status::StatusCode::Error),
            tracestate: span.trace_state,
            name: span.name,
        }
    }

    /// The attribute `name`, or an empty text.
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

impl Ids {
    fn new(trace: &[u8], span: &[u8]) -> Self {
        Self {
            trace: hex(trace),
            span: hex(span),
        }
    }

    /// Reads a `traceparent` whose trace is recorded.
    ///
    /// # Panics
    /// When it is of another format or its trace is not recorded.
    pub fn from_traceparent(traceparent: &str) -> Self {
        let parts: Vec<_> = traceparent.split('-').collect();
        let ["00", trace, span, "01"] = parts.as_slice() else {
            panic!("{traceparent} is not of a trace that is recorded")
        };
        Self {
            trace: (*trace).to_owned(),
            span: (*span).to_owned(),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

fn attributes(given: &[KeyValue]) -> BTreeMap<String, String> {
    let pair = |attribute: &KeyValue| {
        let value = attribute.value.as_ref()?.value.as_ref()?;
        let text = match value {
            Value::StringValue(text) => text.clone(),
            Value::BoolValue(value) => value.to_string(),
            Value::IntValue(value) => value.to_string(),
            Value::DoubleValue(value) => value.to_string(),
            other => format!("{other:?}"),
        };
        Some((attribute.key.clone(), text))
    };
    given.iter().filter_map(pair).collect()
}

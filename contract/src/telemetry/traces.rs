//! Traces: spans that are sent to an OpenTelemetry collector.
//!
//! Owns how spans are recorded and sent, and how their contexts enter and leave the process. What
//! the spans are is up to the programs: they make them with `tracing`'s macros and [`TARGET`]. While
//! traces are off, nobody wants that target, and such a macro costs a comparison.
//!
//! Spans wait in a queue of fixed length, from which a thread of its own sends them: a collector
//! that is away delays nothing, and what does not fit is dropped.

use std::borrow::Borrow;
use std::sync::atomic::{AtomicBool, Ordering};

use async_nats::HeaderMap;
use async_nats::header::HeaderName;
use async_trait::async_trait;
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{SpanContext, TraceContextExt as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    ExporterBuildError, Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Span, Subscriber, info, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{Directive, LevelFilter, Targets};
use tracing_subscriber::registry::LookupSpan;

use crate::settings::TraceSettings;
use crate::trace::TraceContext;
use crate::{connect, exit, header};

/// The target of the spans that are sent. Log lines have others, so that no text of theirs can
/// enter a trace.
pub const TARGET: &str = "litestripe::trace";

/// Links of one span, at most: as many as a batch has events, at most.
const LINKS_MAX: u32 = 1000;

/// The client that sends traces cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    #[error("cannot make the HTTP client that sends traces to OTEL_EXPORTER_OTLP_ENDPOINT")]
    Client(#[from] reqwest::Error),
    #[error("cannot make the exporter that sends traces to OTEL_EXPORTER_OTLP_ENDPOINT")]
    Exporter(#[from] ExporterBuildError),
}

/// Keeps the spans of traces out of the log, unless its filter names one of them.
pub(super) fn never_logged() -> Directive {
    let directive = format!("{TARGET}=off").parse();
    directive.expect("it is a target and a level")
}

/// Starts the thread that sends spans. Call it outside of any runtime.
pub(super) fn provider(
    settings: &TraceSettings,
    program: &'static str,
) -> Result<SdkTracerProvider, TracesError> {
    connect::install_crypto_provider();
    let http = reqwest::blocking::Client::builder()
        .timeout(settings.timeout)
        // The server that a redirect names must not receive the headers.
        .redirect(reqwest::redirect::Policy::none())
        .build()?;
    let client = Client {
        http,
        settings: settings.clone(),
        is_failing: AtomicBool::new(false),
    };
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(settings.endpoint.as_str())
        .with_protocol(Protocol::HttpBinary)
        .with_timeout(settings.timeout)
        .build()?;
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(settings.sampler.clone())
        .with_max_links_per_span(LINKS_MAX)
        .with_resource(resource(settings, program))
        .build())
}

fn resource(settings: &TraceSettings, program: &'static str) -> Resource {
    let attribute = |(name, value): &(String, String)| KeyValue::new(name.clone(), value.clone());
    let resource = Resource::builder()
        .with_service_name(program)
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attributes(settings.attributes.iter().map(attribute));
    match &settings.service_name {
        Some(name) => resource.with_service_name(name.clone()),
        None => resource,
    }
    .build()
}

pub(super) fn layer<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("litestripe"))
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(Targets::new().with_target(TARGET, LevelFilter::INFO))
}

/// Sends spans, and logs once when that begins to fail, with the cause, and once when it works
/// again.
#[derive(Debug)]
struct Client {
    http: reqwest::blocking::Client,
    settings: TraceSettings,
    is_failing: AtomicBool,
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let origin = self.settings.endpoint.origin().ascii_serialization();
        let outcome = self.send(request).await;
        let problem = match &outcome {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("it answered {}", answer.status())),
            Err(error) => Some(exit::chain(error.as_ref())),
        };
        let has_failed = self.is_failing.swap(problem.is_some(), Ordering::Relaxed);
        match problem {
            None if has_failed => info!("traces are sent again to {origin}"),
            Some(problem) if !has_failed => {
                warn!(
                    "cannot send traces to {origin}, spans may be lost while it lasts: {problem}"
                );
            }
            _ => {}
        }
        outcome
    }
}

impl Client {
    async fn send(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        request.headers_mut().extend(self.settings.headers()?);
        let sent = self.http.send_bytes(request).await;
        // The path may hold a token.
        sent.map_err(|error| match error.downcast::<reqwest::Error>() {
            Ok(error) => error.without_url().into(),
            Err(error) => error,
        })
    }
}

/// Makes `span` a child of the span that `context` is of. Call it before the span is entered.
pub fn set_parent(span: &Span, context: &TraceContext) {
    if !span.is_disabled() {
        // Fails only if the span was entered.
        let _ = span.set_parent(Context::new().with_remote_span_context(remote(context)));
    }
}

/// Links `span` to the spans that `contexts` are of. Those that are not recorded are left out: such
/// a link would lead nowhere.
pub fn link(span: &Span, contexts: impl IntoIterator<Item: Borrow<TraceContext>>) {
    if span.is_disabled() {
        return;
    }
    let linked = contexts.into_iter().map(|context| remote(context.borrow()));
    let recorded = linked.filter(SpanContext::is_sampled);
    recorded.for_each(|context| span.add_link(context));
}

/// Returns the context that `span` gives to what follows from it. `None` while traces are off.
pub fn context(span: &Span) -> Option<TraceContext> {
    if span.is_disabled() {
        return None;
    }
    written(span.context().span().span_context())
}

/// Returns the context of the current span, if there is one.
pub fn current() -> Option<TraceContext> {
    written(Context::current().span().span_context())
}

/// Returns the context that a message carries.
pub fn from_headers(headers: &HeaderMap) -> Option<TraceContext> {
    let value = |name| headers.get(name).map(|value| value.as_str());
    TraceContext::parse(value(header::TRACEPARENT)?, value(header::TRACESTATE))
}

/// Has a message carry `context`.
pub fn add_to_headers(headers: &mut HeaderMap, context: &TraceContext) {
    let mut insert = |name, value| headers.insert(HeaderName::from_static(name), value);
    insert(header::TRACEPARENT, context.traceparent());
    if let Some(tracestate) = context.tracestate() {
        insert(header::TRACESTATE, tracestate);
    }
}

fn remote(context: &TraceContext) -> SpanContext {
    let context = TraceContextPropagator::new().extract(&Headers(context));
    context.span().span_context().clone()
}

fn written(context: &SpanContext) -> Option<TraceContext> {
    let traceparent = format!(
        "00-{}-{}-{:02x}",
        context.trace_id(),
        context.span_id(),
        context.trace_flags()
    );
    TraceContext::parse(&traceparent, Some(&context.trace_state().header()))
}

/// A context as the propagator reads it.
struct Headers<'a>(&'a TraceContext);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            header::TRACEPARENT => Some(self.0.traceparent()),
            header::TRACESTATE => self.0.tracestate(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![header::TRACEPARENT, header::TRACESTATE]
    }
}

//! Where traces are sent to, by OpenTelemetry's standard variables.
//!
//! Owns their meaning, as OpenTelemetry's pages "Environment Variable Specification" and "OTLP
//! Exporter" define it, but for two things: without an endpoint nothing is sent, and a malformed
//! value is an error. The other variables count only with an endpoint: a platform may set them for
//! all its programs.

use std::time::Duration;

use opentelemetry_sdk::trace::Sampler;
use percent_encoding::percent_decode_str;
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use secrecy::ExposeSecret as _;

use super::{
    FileError, OTEL_ATTRIBUTES, OTEL_DISABLED, OTEL_ENDPOINT, OTEL_EXPORTER, OTEL_HEADERS,
    OTEL_HEADERS_FILE, OTEL_PROTOCOL, OTEL_SAMPLER, OTEL_SAMPLER_ARG, OTEL_SERVICE_NAME,
    OTEL_TIMEOUT, OTEL_TRACES_ENDPOINT, OTEL_TRACES_HEADERS, OTEL_TRACES_PROTOCOL,
    OTEL_TRACES_TIMEOUT, Reader, Secret, Setting, flag, text,
};

/// What is appended to the endpoint of all signals. OpenTelemetry: "Endpoint URLs for OTLP/HTTP".
const TRACES_PATH: &str = "v1/traces";

const ENDPOINT: &str = "an http:// or https:// URL without a user, query or fragment, such as http://otel-collector:4318; \
    credentials go into OTEL_EXPORTER_OTLP_HEADERS";

const HEADERS: &str = "HTTP headers as name=value, comma-separated, each value percent-encoded";

const PROTOCOL: &str = "http/protobuf, the only protocol that is supported; a collector usually receives it on port 4318";

const TIMEOUT: &str = "a number of milliseconds above 0, without a unit";

const SAMPLER: &str = "always_on, always_off, traceidratio, parentbased_always_on, parentbased_always_off or \
    parentbased_traceidratio";

/// How traces are made and where they are sent.
#[derive(Debug, Clone)]
pub struct TraceSettings {
    pub(crate) endpoint: Url,
    headers: Option<Secret>,
    /// How long one request may take.
    pub(crate) timeout: Duration,
    pub(crate) sampler: Sampler,
    /// `None` for the program's name.
    pub(crate) service_name: Option<String>,
    pub(crate) attributes: Vec<(String, String)>,
}

impl TraceSettings {
    /// Returns `None` if no traces are to be sent.
    pub fn read(reader: &mut Reader) -> Option<Self> {
        if !reader.is_given(&OTEL_ENDPOINT) && !reader.is_given(&OTEL_TRACES_ENDPOINT) {
            return None;
        }
        let is_disabled = reader.defaulted(&OTEL_DISABLED, "true or false", flag);
        let exporter = reader.defaulted(&OTEL_EXPORTER, "otlp or none", |value| match value {
            "otlp" => Some(true),
            "none" => Some(false),
            _ => None,
        });
        if is_disabled || !exporter {
            return None;
        }
        let endpoint = read_endpoint(reader);
        either(
            reader,
            [&OTEL_TRACES_PROTOCOL, &OTEL_PROTOCOL],
            PROTOCOL,
            |value| (value == "http/protobuf").then_some(()),
        );
        let headers = read_headers(reader);
        let timeout = either(
            reader,
            [&OTEL_TRACES_TIMEOUT, &OTEL_TIMEOUT],
            TIMEOUT,
            milliseconds,
        );
        let sampler = read_sampler(reader);
        let service_name = reader.optional(&OTEL_SERVICE_NAME, "a name", text);
        let expected = "attributes as name=value, comma-separated, each value percent-encoded";
        let attributes = reader.optional(&OTEL_ATTRIBUTES, expected, pairs);
        Some(Self {
            endpoint: endpoint?,
            headers,
            timeout: timeout?,
            sampler,
            service_name,
            attributes: attributes.unwrap_or_default(),
        })
    }

    /// Returns the headers of a request, which may hold a token, as their file has them now.
    ///
    /// # Errors
    /// The file cannot be used any more.
    pub(crate) fn headers(&self) -> Result<HeaderMap, FileError> {
        let Some(given) = &self.headers else {
            return Ok(HeaderMap::new());
        };
        let now = given.reread(HEADERS, headers).transpose()?;
        let at_start = || headers(given.at_start().expose_secret());
        Ok(now.or_else(at_start).unwrap_or_default())
    }
}

/// Reads the setting of traces, or without it that of all signals. The latter has the default.
fn either<T>(
    reader: &mut Reader,
    [of_traces, of_all]: [&Setting; 2],
    expected: &str,
    parse: fn(&str) -> Option<T>,
) -> Option<T> {
    if reader.is_given(of_traces) {
        return reader.optional(of_traces, expected, parse);
    }
    match of_all.default {
        Some(_) => Some(reader.defaulted(of_all, expected, parse)),
        None => reader.optional(of_all, expected, parse),
    }
}

fn read_endpoint(reader: &mut Reader) -> Option<Url> {
    if reader.is_given(&OTEL_TRACES_ENDPOINT) {
        return reader.optional(&OTEL_TRACES_ENDPOINT, ENDPOINT, endpoint);
    }
    let mut base = reader.optional(&OTEL_ENDPOINT, ENDPOINT, endpoint)?;
    let path = base.path().trim_end_matches('/');
    base.set_path(&format!("{path}/{TRACES_PATH}"));
    Some(base)
}

fn endpoint(value: &str) -> Option<Url> {
    let url = Url::parse(value).ok()?;
    let fits = matches!(url.scheme(), "http" | "https")
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    fits.then_some(url)
}

fn read_headers(reader: &mut Reader) -> Option<Secret> {
    if reader.is_given(&OTEL_TRACES_HEADERS) {
        let secret = |value: &str| headers(value).map(|_| Secret::from(value.to_owned()));
        return reader.optional(&OTEL_TRACES_HEADERS, HEADERS, secret);
    }
    let read = reader.secret(&OTEL_HEADERS, &OTEL_HEADERS_FILE, HEADERS, headers);
    read.map(|(secret, _)| secret)
}

fn headers(value: &str) -> Option<HeaderMap> {
    let header = |(name, value): (String, String)| {
        let mut value = HeaderValue::from_str(&value).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::from_bytes(name.as_bytes()).ok()?, value))
    };
    pairs(value)?.into_iter().map(header).collect()
}

/// Parses `name=value,name=value`. Blanks around names and values are ignored, as is an empty last
/// pair. W3C: "Baggage", without properties.
fn pairs(value: &str) -> Option<Vec<(String, String)>> {
    let value = value.trim_end().trim_end_matches(',');
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
        let name = name.trim();
        (!name.is_empty()).then(|| (name.to_owned(), value.into_owned()))
    };
    value.split(',').map(pair).collect()
}

fn milliseconds(value: &str) -> Option<Duration> {
    let milliseconds = value
        .parse()
        .ok()
        .filter(|milliseconds| *milliseconds > 0)?;
    Some(Duration::from_millis(milliseconds))
}

fn read_sampler(reader: &mut Reader) -> Sampler {
    let ratio = reader.defaulted(&OTEL_SAMPLER_ARG, "a number from 0 to 1", |value| {
        let ratio = value.parse().ok()?;
        (0.0..=1.0).contains(&ratio).then_some(ratio)
    });
    reader.defaulted(&OTEL_SAMPLER, SAMPLER, |name| {
        let (is_parent_based, name) = match name.strip_prefix("parentbased_") {
            Some(name) => (true, name),
            None => (false, name),
        };
        let sampler = match name {
            "always_on" => Sampler::AlwaysOn,
            "always_off" => Sampler::AlwaysOff,
            "traceidratio" => Sampler::TraceIdRatioBased(ratio),
            _ => return None,
        };
        Some(if is_parent_based {
            Sampler::ParentBased(Box::new(sampler))
        } else {
            sampler
        })
    })
}

#[cfg(test)]
mod tests;

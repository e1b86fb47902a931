//! W3C Trace Context: the trace that a delivery, an event or a signal belongs to.
//!
//! Owns what is a valid one. May not know whether traces are recorded: without that, the context of
//! the delivery is passed on as it came.

/// The longest `tracestate` that is passed on, in bytes. W3C: "Trace Context" asks for at least
/// that.
const TRACESTATE_BYTES_MAX: usize = 512;

/// A position in a trace, as the headers [`TRACEPARENT`](crate::header::TRACEPARENT) and
/// [`TRACESTATE`](crate::header::TRACESTATE) hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    traceparent: String,
    tracestate: Option<String>,
}

impl TraceContext {
    /// Returns the context if `traceparent` is valid. One of a later version is passed on as version
    /// 00, without what that does not know (W3C: "Versioning of traceparent"). A `tracestate` that
    /// is empty, too long or not printable ASCII is left out.
    pub fn parse(traceparent: &str, tracestate: Option<&str>) -> Option<Self> {
        let parts: Vec<&str> = traceparent.split('-').collect();
        let [version, trace, parent, flags, added @ ..] = parts.as_slice() else {
            return None;
        };
        let is_later = *version != "00";
        let is_id = |part: &str, length| is_hex(part, length) && part.bytes().any(|b| b != b'0');
        let is_valid = is_hex(version, 2)
            && *version != "ff"
            && (is_later || added.is_empty())
            && is_id(trace, 32)
            && is_id(parent, 16)
            && is_hex(flags, 2);
        let is_passed_on = |state: &&str| {
            (1..=TRACESTATE_BYTES_MAX).contains(&state.len())
                && state.bytes().all(|byte| matches!(byte, b' '..=b'~'))
        };
        let sampled = || u8::from_str_radix(flags, 16).unwrap_or_default() & 1;
        is_valid.then(|| Self {
            traceparent: match is_later {
                true => format!("00-{trace}-{parent}-{:02x}", sampled()),
                false => traceparent.to_owned(),
            },
            tracestate: tracestate.filter(is_passed_on).map(str::to_owned),
        })
    }

    pub fn traceparent(&self) -> &str {
        &self.traceparent
    }

    pub fn tracestate(&self) -> Option<&str> {
        self.tracestate.as_deref()
    }

    /// Returns `traceparent` and `tracestate`.
    pub fn into_parts(self) -> (String, Option<String>) {
        (self.traceparent, self.tracestate)
    }
}

fn is_hex(part: &str, length: usize) -> bool {
    let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    part.len() == length && part.bytes().all(is_digit)
}

#[cfg(test)]
mod tests;

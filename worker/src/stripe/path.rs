//! Paths of Stripe's API.

use std::fmt;

pub(crate) const CHECKOUT_SESSIONS: Path<'_> = Path::new("/v1/checkout/sessions");
pub(crate) const CUSTOMERS: Path<'_> = Path::new("/v1/customers");
pub(crate) const EVENTS: Path<'_> = Path::new("/v1/events");
pub(crate) const EVENT_DESTINATIONS: Path<'_> = Path::new("/v2/core/event_destinations");
pub(crate) const SUBSCRIPTION_ITEMS: Path<'_> = Path::new("/v1/subscription_items");
pub(crate) const SUBSCRIPTIONS: Path<'_> = Path::new("/v1/subscriptions");
pub(crate) const WEBHOOK_ENDPOINTS: Path<'_> = Path::new("/v1/webhook_endpoints");

/// The path of a list, of the object in it with an id, or of an action on that object.
#[derive(Clone, Copy)]
pub(crate) struct Path<'a> {
    list: &'static str,
    id: Option<&'a str>,
    action: Option<&'static str>,
}

impl Path<'_> {
    const fn new(list: &'static str) -> Self {
        Self {
            list,
            id: None,
            action: None,
        }
    }

    pub(crate) const fn of(self, id: &str) -> Path<'_> {
        Path {
            list: self.list,
            id: Some(id),
            action: None,
        }
    }

    pub(crate) const fn action(self, action: &'static str) -> Self {
        Self {
            action: Some(action),
            ..self
        }
    }

    /// Returns the path with `{id}` in place of the id.
    pub(crate) fn template(self) -> String {
        Path {
            id: self.id.map(|_| "{id}"),
            ..self
        }
        .to_string()
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.list)?;
        for part in self.id.into_iter().chain(self.action) {
            write!(f, "/{part}")?;
        }
        Ok(())
    }
}

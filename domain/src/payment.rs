//! The ids of one payment, by which an orphan, a lookup and a resolution name it.

use serde::Serialize;

use crate::event::CheckoutSession;

/// Stripe's ids of a payment, as far as known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PaymentIds {
    /// The Checkout Session that was paid, if one is known.
    pub checkout_session_id: Option<String>,
    pub stripe_customer_id: Option<String>,
    pub stripe_subscription_id: Option<String>,
}

impl PaymentIds {
    pub(crate) fn from_session(session: &CheckoutSession) -> Self {
        Self {
            checkout_session_id: Some(session.id.clone()),
            stripe_customer_id: session.stripe_customer_id.clone(),
            stripe_subscription_id: session.stripe_subscription_id.clone(),
        }
    }

    /// Returns the ids that are known.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        [
            &self.checkout_session_id,
            &self.stripe_customer_id,
            &self.stripe_subscription_id,
        ]
        .into_iter()
        .filter_map(Option::as_deref)
    }
}

/// The id of a connected account. Stripe returns its objects if the id is sent as `Stripe-Context`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AccountId<'a>(pub &'a str);

/// The application's id of a user. The name is Stripe's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientReferenceId<'a>(pub &'a str);

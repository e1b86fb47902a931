//! The ids of one person: the customer, the subscriptions and the Checkout Sessions.
//!
//! Owns which messages belong to the person. Pure.

use std::collections::BTreeSet;

use litestripe_domain::event::owner::{self, Owner};
use memchr::memmem;

/// The ids that stand for one person. Ids are only ever added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ids(BTreeSet<String>);

impl Ids {
    /// Adds `ids`. Returns whether one of them is new.
    pub fn add(&mut self, ids: impl IntoIterator<Item = String>) -> bool {
        let before = self.0.len();
        self.0.extend(ids.into_iter().filter(|id| !id.is_empty()));
        self.0.len() > before
    }

    /// Iterates over the ids.
    pub fn iter(&self) -> impl Iterator<Item = &str> + Clone {
        self.0.iter().map(String::as_str)
    }

    /// Returns the ids as a list, for a database query.
    pub fn all(&self) -> Vec<&str> {
        self.iter().collect()
    }

    /// Returns whether a message's `body` belongs to the person. Adds the ids of its object if one
    /// of them is the person's.
    ///
    /// A message about another customer's object does not, whatever else it mentions. A message
    /// about an object without a customer does if one of its strings, anywhere, equals one of the
    /// ids.
    pub fn learn_if_own(&mut self, body: &[u8]) -> bool {
        // A plain search finds every id: neither Stripe nor we escape characters in ids.
        if !self
            .0
            .iter()
            .any(|id| memmem::find(body, id.as_bytes()).is_some())
        {
            return false;
        }
        let is_own = |id: &str| self.0.contains(id);
        let Some(owner) = Owner::parse(body) else {
            return owner::words(body).any(is_own);
        };
        let belongs = owner.belongs_to(is_own);
        if owner.ids().any(is_own) {
            self.add(owner.ids().map(str::to_owned));
        }
        belongs
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ids(some: &[&str]) -> Ids {
        let mut ids = Ids::default();
        ids.add(some.iter().copied().map(str::to_owned));
        ids
    }

    fn session(customer: serde_json::Value, reference: &str) -> String {
        let object = json!({ "id": "cs_1", "object": "checkout.session", "customer": customer,
            "subscription": "sub_1", "client_reference_id": reference });
        json!({ "type": "checkout.session.completed", "data": { "object": object } }).to_string()
    }

    #[test]
    fn message_of_the_person_adds_its_other_ids() {
        let mut customer = ids(&["cus_1"]);
        assert!(customer.learn_if_own(session(json!("cus_1"), "user").as_bytes()));
        assert_eq!(customer, ids(&["cus_1", "cs_1", "sub_1"]));
        let mut guest = ids(&["sub_1"]);
        assert!(guest.learn_if_own(session(json!(null), "user").as_bytes()));
        assert_eq!(guest, ids(&["cs_1", "sub_1"]));
    }

    #[test]
    fn message_of_another_customer_does_not_belong_to_a_person_it_names() {
        let mut person = ids(&["cus_1"]);
        assert!(!person.learn_if_own(session(json!("cus_2"), "cus_1").as_bytes()));
        assert!(
            person.learn_if_own(session(json!(null), "cus_1").as_bytes()),
            "it has no customer, and it names the person"
        );
        assert!(!person.learn_if_own(session(json!("cus_12"), "user").as_bytes()));
        assert_eq!(person, ids(&["cus_1"]));
    }

    #[test]
    fn invalid_json_is_searched_for_whole_ids() {
        let mut person = ids(&["cus_1"]);
        assert!(person.learn_if_own(b"{\"customer\":\"cus_1\",\"broken"));
        assert!(!person.learn_if_own(b"{\"customer\":\"cus_12\",\"broken"));
        assert!(person.learn_if_own(b"cus_1"));
    }
}

//! The ids of one person: the customer, their subscriptions and Checkout Sessions.
//!
//! Owns what belongs to the person. Pure.

use std::collections::BTreeSet;

use litestripe_domain::event::owner::Owner;
use memchr::memmem;

/// Ids that all stand for one person. They only become more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ids(BTreeSet<String>);

impl Ids {
    /// Adds `ids`. Returns whether one of them is new.
    pub fn add(&mut self, ids: impl IntoIterator<Item = String>) -> bool {
        let before = self.0.len();
        self.0.extend(ids.into_iter().filter(|id| !id.is_empty()));
        self.0.len() > before
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &str> + Clone {
        self.0.iter().map(String::as_str)
    }

    /// All of them, to ask a database.
    pub fn all(&self) -> Vec<&str> {
        self.iter().collect()
    }

    /// Whether `body`, a message's, is the person's. Learns the ids that it reveals.
    ///
    /// What is about another customer's object is not, whoever else it mentions. What is about
    /// nobody's is, if it names one of the ids as a whole text anywhere.
    pub fn add_from_message(&mut self, body: &[u8]) -> bool {
        // Stripe writes ids without escapes, and so do we.
        if !self
            .0
            .iter()
            .any(|id| memmem::find(body, id.as_bytes()).is_some())
        {
            return false;
        }
        let Some(owner) = Owner::parse(body) else {
            return self.occur_in(body);
        };
        let is_own = owner
            .customer
            .iter()
            .chain(&owner.payments)
            .any(|id| self.0.contains(id));
        if is_own {
            self.add(owner.customer.into_iter().chain(owner.payments));
            return true;
        }
        owner.customer.is_none() && owner.contains_text(|text| self.0.contains(text))
    }

    /// Whether one of the ids stands in `body`, which is no JSON, and not as a part of a longer one.
    fn occur_in(&self, body: &[u8]) -> bool {
        let is_part = |byte: Option<&u8>| {
            byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
        };
        self.0.iter().any(|id| {
            memmem::find_iter(body, id.as_bytes()).any(|start| {
                let before = start.checked_sub(1).and_then(|at| body.get(at));
                !is_part(before) && !is_part(body.get(start + id.len()))
            })
        })
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
    fn what_belongs_to_the_person_reveals_more_of_their_ids() {
        let mut of_customer = ids(&["cus_1"]);
        assert!(of_customer.add_from_message(session(json!("cus_1"), "user").as_bytes()));
        assert_eq!(of_customer, ids(&["cus_1", "cs_1", "sub_1"]));
        let mut of_guest = ids(&["sub_1"]);
        assert!(of_guest.add_from_message(session(json!(null), "user").as_bytes()));
        assert_eq!(of_guest, ids(&["cs_1", "sub_1"]));
    }

    #[test]
    fn what_is_another_customers_is_not_taken_for_naming_the_person() {
        let mut person = ids(&["cus_1"]);
        assert!(!person.add_from_message(session(json!("cus_2"), "cus_1").as_bytes()));
        assert!(
            person.add_from_message(session(json!(null), "cus_1").as_bytes()),
            "nobody else's, and it names them"
        );
        assert!(!person.add_from_message(session(json!("cus_12"), "user").as_bytes()));
        assert_eq!(person, ids(&["cus_1"]));
    }

    #[test]
    fn what_is_no_json_is_searched_for_whole_ids() {
        let mut person = ids(&["cus_1"]);
        assert!(person.add_from_message(b"{\"customer\":\"cus_1\",\"broken"));
        assert!(!person.add_from_message(b"{\"customer\":\"cus_12\",\"broken"));
        assert!(person.add_from_message(b"cus_1"));
    }
}

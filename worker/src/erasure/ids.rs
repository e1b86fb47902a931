//! The ids of the people to erase: the customer, the subscriptions and the Checkout Sessions.
//!
//! Owns which messages belong to whom. Pure.

use std::collections::BTreeSet;

use aho_corasick::AhoCorasick;
use litestripe_domain::event::owner::{self, Owner};

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

    fn contains(&self, id: &str) -> bool {
        self.0.contains(id)
    }
}

/// Several people, for whom the streams are read once.
#[derive(Debug, Clone, Default)]
pub struct People {
    people: Vec<Ids>,
    /// Finds all of their ids. `None` if there are none.
    search: Option<AhoCorasick>,
}

impl People {
    pub fn new(people: Vec<Ids>) -> Self {
        let mut people = Self {
            people,
            search: None,
        };
        people.prepare();
        people
    }

    fn prepare(&mut self) {
        // Only more ids than fit into memory could fail.
        self.search = AhoCorasick::new(self.people.iter().flat_map(Ids::iter)).ok();
    }

    /// Iterates over the ids of each person.
    pub fn iter(&self) -> impl Iterator<Item = &Ids> {
        self.people.iter()
    }

    /// Returns the ids of all of them.
    pub fn ids(&self) -> Ids {
        Ids(self
            .people
            .iter()
            .flat_map(|ids| ids.0.iter().cloned())
            .collect())
    }

    /// Returns how many ids they have. It only grows.
    pub fn count(&self) -> usize {
        self.people.iter().map(|ids| ids.0.len()).sum()
    }

    /// Adds ids of the person at `index`.
    pub fn add(&mut self, index: usize, ids: impl IntoIterator<Item = String>) {
        if self
            .people
            .get_mut(index)
            .is_some_and(|known| known.add(ids))
        {
            self.prepare();
        }
    }

    /// Returns the people to whom a message with this `body` belongs, by their index. Adds the ids
    /// of its object to those that have one of them.
    ///
    /// A message about another customer's object does not belong to a person, whatever else it
    /// mentions. A message about an object without a customer does if one of its texts, anywhere,
    /// is one of the ids.
    pub fn owners_of(&mut self, body: &[u8]) -> Vec<usize> {
        // A plain search finds every id: neither Stripe nor we escape characters in ids.
        if !self
            .search
            .as_ref()
            .is_some_and(|search| search.is_match(body))
        {
            return Vec::new();
        }
        let Some(owner) = Owner::parse(body) else {
            let named = |ids: &Ids| owner::words(body).any(|word| ids.contains(word));
            return self.indexes(named);
        };
        let owners = self.indexes(|ids| owner.belongs_to(|id| ids.contains(id)));
        for index in &owners {
            if self
                .people
                .get(*index)
                .is_some_and(|ids| owner.ids().any(|id| ids.contains(id)))
            {
                self.add(*index, owner.ids().map(str::to_owned));
            }
        }
        owners
    }

    fn indexes(&self, which: impl Fn(&Ids) -> bool) -> Vec<usize> {
        let people = self.people.iter().enumerate();
        let those = people.filter(|(_, ids)| which(ids));
        those.map(|(index, _)| index).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn people(some: &[&str]) -> People {
        let mut ids = Ids::default();
        ids.add(some.iter().copied().map(str::to_owned));
        People::new(vec![ids])
    }

    #[track_caller]
    fn check_ids(people: &People, some: &[&str]) {
        assert_eq!(people.ids().all(), some);
    }

    fn session(customer: serde_json::Value, reference: &str) -> String {
        let object = json!({ "id": "cs_1", "object": "checkout.session", "customer": customer,
            "subscription": "sub_1", "client_reference_id": reference });
        json!({ "type": "checkout.session.completed", "data": { "object": object } }).to_string()
    }

    #[test]
    fn message_of_the_person_adds_its_other_ids() {
        let mut customer = people(&["cus_1"]);
        assert_eq!(
            customer.owners_of(session(json!("cus_1"), "user").as_bytes()),
            [0]
        );
        check_ids(&customer, &["cs_1", "cus_1", "sub_1"]);
        let mut guest = people(&["sub_1"]);
        assert_eq!(
            guest.owners_of(session(json!(null), "user").as_bytes()),
            [0]
        );
        check_ids(&guest, &["cs_1", "sub_1"]);
    }

    #[test]
    fn message_of_another_customer_does_not_belong_to_a_person_it_names() {
        let mut person = people(&["cus_1"]);
        let mut is_own = |body: String| person.owners_of(body.as_bytes()) == [0];
        assert!(!is_own(session(json!("cus_2"), "cus_1")));
        assert!(
            is_own(session(json!(null), "cus_1")),
            "it has no customer, and it names the person"
        );
        assert!(!is_own(session(json!("cus_12"), "user")));
        check_ids(&person, &["cus_1"]);
    }

    #[test]
    fn invalid_json_is_searched_for_whole_ids() {
        let mut person = people(&["cus_1"]);
        let mut is_own = |body: &[u8]| person.owners_of(body) == [0];
        assert!(is_own(b"{\"customer\":\"cus_1\",\"broken"));
        assert!(!is_own(b"{\"customer\":\"cus_12\",\"broken"));
        assert!(is_own(b"cus_1"));
    }

    #[test]
    fn each_of_several_people_learns_only_own_ids() {
        let person = |id: &str| {
            let mut ids = Ids::default();
            ids.add([id.to_owned()]);
            ids
        };
        let mut people = People::new(vec![person("cus_1"), person("cus_2")]);
        assert_eq!(
            people.owners_of(session(json!("cus_2"), "x").as_bytes()),
            [1]
        );
        let ids: Vec<_> = people.iter().map(Ids::all).collect();
        assert_eq!(ids, [vec!["cus_1"], vec!["cs_1", "cus_2", "sub_1"]]);
    }
}

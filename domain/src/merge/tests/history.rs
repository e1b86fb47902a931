//! Simulated histories of a subscription: the changes, and the events that Stripe would send.

use std::collections::BTreeMap;

use litestripe_contract::event::SNAPSHOT_TYPE;
use litestripe_contract::signal::Subscription;
use serde_json::{Value, json};

use super::model::{
    ACCOUNT, CUSTOMER, Model, ModelItem, PeriodAt, SUBSCRIPTION, Shape, previous_attributes,
};
use super::random::Random;

const START: i64 = 1_750_000_000;
const MONTH_S: i64 = 30 * 86_400;

/// A history: its events in the order in which they happened.
pub(super) struct History {
    pub(super) events: Vec<SimulatedEvent>,
    /// The subscription at the end, if the history has an event of the subscription.
    pub(super) truth: Option<Model>,
    pub(super) shape: Shape,
}

/// An event, and the values with which its merge is compared.
pub(super) struct SimulatedEvent {
    pub(super) body: Value,
    /// The same event as another endpoint's API version renders it. Must be read as equal.
    pub(super) twin: Option<Value>,
    pub(super) metadata: BTreeMap<String, String>,
    /// The subscription after it, if it is a subscription event.
    pub(super) after: Option<Subscription>,
    /// Whether it is a second Event object for the previous change.
    pub(super) repeats: bool,
    pub(super) session: Option<(String, Option<&'static str>)>,
}

/// Simulates a history of about `length` events.
pub(super) fn simulate(random: &mut Random, length: usize) -> History {
    let mut simulation = Simulation::new(random);
    while simulation.events.len() < length {
        simulation.step();
    }
    simulation.finish()
}

struct Simulation<'a> {
    random: &'a mut Random,
    now: i64,
    /// How likely the next step is in the same second, in percent.
    same_second_percent: usize,
    shape: Shape,
    model: Option<Model>,
    events: Vec<SimulatedEvent>,
    counter: u64,
}

impl<'a> Simulation<'a> {
    fn new(random: &'a mut Random) -> Self {
        let only_plan = random.percent(10);
        let shape = Shape {
            period: random.pick(&[PeriodAt::Subscription, PeriodAt::Items, PeriodAt::Both]),
            customer_expanded: random.percent(10),
            product_expanded: random.percent(10),
            with_plan: random.percent(50),
            only_plan,
            nulls_absent: random.percent(10),
            old: random.percent(10),
        };
        let same_second_percent = random.pick(&[0, 30, 60, 60, 90]);
        Self {
            random,
            now: START,
            same_second_percent,
            shape,
            model: None,
            events: vec![],
            counter: 0,
        }
    }

    fn finish(self) -> History {
        History {
            events: self.events,
            truth: self.model,
            shape: self.shape,
        }
    }

    fn fresh(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn step(&mut self) {
        if !self.random.percent(self.same_second_percent) {
            self.now += self.random.pick(&[1, 1, 2, 3, 600, MONTH_S]);
        }
        if self
            .random
            .percent(if self.events.is_empty() { 20 } else { 8 })
        {
            return self.checkout_session();
        }
        let Some(model) = self.model.clone() else {
            return self.create();
        };
        if self.random.percent(3) {
            return self.fetch(&model);
        }
        match model.status {
            "incomplete" => self.while_incomplete(model),
            "canceled" | "incomplete_expired" => self.after_the_end(model),
            _ => self.while_live(model),
        }
    }

    fn create(&mut self) {
        let status =
            self.random
                .pick(&["incomplete", "incomplete", "trialing", "active", "active"]);
        let end = self.now + MONTH_S;
        let item = self.item(end);
        let model = Model {
            status,
            created: self.now,
            cancel_at: None,
            cancel_at_period_end: false,
            canceled_at: None,
            ended_at: None,
            trial_end: (status == "trialing").then_some(self.now + 7 * 86_400),
            items: vec![item],
            metadata: BTreeMap::new(),
            trial_start: (status == "trialing").then_some(self.now),
            cancellation_reason: None,
            collection_method: "charge_automatically",
            pause_collection: None,
            latest_invoice: 0,
            default_payment_method: None,
            pending_update: false,
        };
        let object = model.render(self.shape);
        self.record(
            "customer.subscription.created",
            &model,
            json!({ "object": object }),
        );
        self.model = Some(model);
    }

    fn item(&mut self, end: i64) -> ModelItem {
        let quantity = if self.random.percent(20) {
            None
        } else {
            Some(self.random.below(3) as i64 + 1)
        };
        let price = self.random.below(6) as u64;
        ModelItem {
            id: self.fresh(),
            price,
            quantity,
            start: end - MONTH_S,
            end,
        }
    }

    fn while_incomplete(&mut self, mut model: Model) {
        match self.random.below(10) {
            0..=5 => model.status = "active",
            6 => model.status = "incomplete_expired",
            7 => self.change_metadata(&mut model),
            _ => model.latest_invoice += 1,
        }
        self.update(model, None);
    }

    fn after_the_end(&mut self, mut model: Model) {
        if self.random.percent(70) {
            self.change_metadata(&mut model);
        } else {
            model.latest_invoice += 1;
        }
        self.update(model, None);
    }

    fn while_live(&mut self, mut model: Model) {
        let mut twin = None;
        match self.random.below(20) {
            0 | 1 => self.change_status(&mut model, &mut twin),
            2 => return self.trial_will_end(model),
            3 => self.renew(&mut model),
            4 | 5 => self.plan_or_undo_cancellation(&mut model),
            6 => model.items[0].price = (model.items[0].price + 1) % 4,
            7..=9 => model.items[0].quantity = model.items[0].quantity.map(|n| n % 2 + 1),
            10 => self.add_or_remove_item(&mut model),
            11 => self.change_details(&mut model),
            12 => model.latest_invoice += 1,
            13 => self.pending_update(&mut model, &mut twin),
            14 => return self.delete(model),
            15 if self.random.percent(30) => return self.back_and_forth(model),
            _ => self.change_metadata(&mut model),
        }
        self.update(model, twin);
    }

    fn change_status(&mut self, model: &mut Model, twin: &mut Option<&'static str>) {
        let from = model.status;
        model.status = match from {
            "trialing" if self.random.percent(30) => "paused",
            "active" => self
                .random
                .pick(&["past_due", "past_due", "unpaid", "renamed_by_stripe"]),
            "past_due" => self.random.pick(&["active", "active", "unpaid"]),
            _ => "active",
        };
        *twin = match (from, model.status) {
            (_, "paused") => Some("customer.subscription.paused"),
            ("paused", _) => Some("customer.subscription.resumed"),
            // If a trial ends early, `trial_will_end` comes at the moment it ends.
            ("trialing", _) => self
                .random
                .percent(50)
                .then_some("customer.subscription.trial_will_end"),
            _ => None,
        };
        if from == "trialing" {
            model.trial_end = Some(self.now);
        }
    }

    fn renew(&mut self, model: &mut Model) {
        let only_one = self.random.percent(20);
        for item in model
            .items
            .iter_mut()
            .rev()
            .take(if only_one { 1 } else { usize::MAX })
        {
            (item.start, item.end) = (item.end, item.end + MONTH_S);
        }
        model.latest_invoice += 1;
    }

    fn plan_or_undo_cancellation(&mut self, model: &mut Model) {
        if model.cancel_at.is_some() {
            model.cancel_at = None;
            model.cancel_at_period_end = false;
            model.canceled_at = None;
            model.cancellation_reason = None;
        } else {
            model.cancel_at = model.items.iter().map(|item| item.end).max();
            model.cancel_at_period_end = self.random.percent(50);
            model.canceled_at = Some(self.now);
            model.cancellation_reason = Some("cancellation_requested");
        }
    }

    fn add_or_remove_item(&mut self, model: &mut Model) {
        if model.items.len() > 1 {
            model.items.pop();
        } else {
            let end = model.items[0].end + self.random.pick(&[0, 0, 86_400]);
            model.items.push(self.item(end));
        }
    }

    fn change_details(&mut self, model: &mut Model) {
        match self.random.below(6) {
            0..=2 => {
                let behavior = self.random.pick(&["void", "keep_as_draft"]);
                model.pause_collection =
                    Some(behavior).filter(|behavior| model.pause_collection != Some(behavior));
            }
            3 => model.pause_collection = None,
            4 => {
                model.collection_method =
                    self.random.pick(&["charge_automatically", "send_invoice"])
            }
            _ => model.default_payment_method = Some(self.random.below(3) as u64),
        }
    }

    fn pending_update(&mut self, model: &mut Model, twin: &mut Option<&'static str>) {
        if model.pending_update {
            let applied = self.random.percent(50);
            model.items[0].price = (model.items[0].price + u64::from(applied)) % 4;
            *twin = Some(match applied {
                true => "customer.subscription.pending_update_applied",
                false => "customer.subscription.pending_update_expired",
            });
        }
        model.pending_update = !model.pending_update;
    }

    fn change_metadata(&mut self, model: &mut Model) {
        let key = self.random.pick(&["plan", "seats"]);
        match self.random.below(4) {
            0 => drop(model.metadata.remove(key)),
            value => drop(model.metadata.insert(key, value as u64)),
        }
    }

    fn trial_will_end(&mut self, model: Model) {
        let object = model.render(self.shape);
        self.record(
            "customer.subscription.trial_will_end",
            &model,
            json!({ "object": object }),
        );
    }

    fn delete(&mut self, mut model: Model) {
        model.status = "canceled";
        model.ended_at = Some(self.now);
        model.canceled_at = model.canceled_at.or(Some(self.now));
        let object = model.render(self.shape);
        self.record(
            "customer.subscription.deleted",
            &model,
            json!({ "object": object }),
        );
        self.model = Some(model);
    }

    /// Makes a change and undoes it within a second.
    fn back_and_forth(&mut self, model: Model) {
        let mut changed = model.clone();
        self.change_metadata(&mut changed);
        self.update(changed, None);
        self.update(model, None);
    }

    /// Makes an update, with the more specific event `twin` for the same change before or after it.
    fn update(&mut self, model: Model, twin: Option<&'static str>) {
        let before = self
            .model
            .replace(model.clone())
            .map(|before| before.render(self.shape));
        let object = model.render(self.shape);
        let previous = previous_attributes(&before.unwrap_or_default(), &object);
        let occasion_first = self.random.percent(50);
        if let Some(twin) = twin.filter(|_| occasion_first) {
            self.record(twin, &model, json!({ "object": object }));
        }
        if !previous.is_empty() {
            let data = json!({ "object": object, "previous_attributes": previous });
            // Stripe: "in some cases, two separate Event objects are generated".
            self.record("customer.subscription.updated", &model, data.clone());
            if self.random.percent(2) {
                self.record("customer.subscription.updated", &model, data);
                self.events
                    .last_mut()
                    .expect("it was just recorded")
                    .repeats = true;
            }
        }
        if let Some(twin) = twin.filter(|_| !occasion_first) {
            self.record(twin, &model, json!({ "object": object }));
        }
    }

    /// Simulates a fetch by a worker. The snapshot is stamped 1 s before the fetch started, because
    /// all changes of that second have happened by then.
    fn fetch(&mut self, model: &Model) {
        let object = model.render(self.shape);
        let event = self.event(SNAPSHOT_TYPE, self.now - 1, json!({ "object": object }));
        let after = Some(model.shown(self.shape));
        let metadata = BTreeMap::new();
        self.events.push(SimulatedEvent {
            body: event,
            twin: None,
            metadata,
            after,
            repeats: false,
            session: None,
        });
    }

    fn checkout_session(&mut self) {
        let reference = self.random.pick(&[
            Some("user-1"),
            Some("user-1"),
            Some("user-2"),
            Some(""),
            None,
        ]);
        let event_type = self.random.pick(&[
            "checkout.session.completed",
            "checkout.session.completed",
            "checkout.session.async_payment_succeeded",
            "checkout.session.async_payment_failed",
        ]);
        let id = format!("cs_{}", self.random.below(2));
        let metadata: BTreeMap<String, String> = (0..self.random.below(3))
            .map(|n| (format!("m{n}"), self.random.below(9).to_string()))
            .collect();
        let object = json!({ "id": id, "object": "checkout.session", "mode": "subscription", "status": "complete",
            "payment_status": "paid", "customer": CUSTOMER, "subscription": SUBSCRIPTION,
            "client_reference_id": reference, "metadata": metadata, "created": self.now - 60 });
        let body = self.event(event_type, self.now, json!({ "object": object }));
        let reference = reference.filter(|reference| !reference.is_empty());
        let session = Some((id, reference));
        self.events.push(SimulatedEvent {
            body,
            twin: None,
            metadata,
            after: None,
            repeats: false,
            session,
        });
    }

    fn record(&mut self, event_type: &str, model: &Model, data: Value) {
        let body = self.event(event_type, self.now, data);
        let twin = self
            .random
            .percent(5)
            .then(|| self.rendered_differently(&body, model));
        let after = Some(model.shown(self.shape));
        self.events.push(SimulatedEvent {
            body,
            twin,
            metadata: model.shown_metadata(),
            after,
            repeats: false,
            session: None,
        });
    }

    fn event(&mut self, event_type: &str, created: i64, data: Value) -> Value {
        // Random ids, because Stripe's ids do not show the order within a second.
        let id = format!("evt_{:016x}", self.random.next());
        json!({ "id": id, "object": "event", "created": created, "data": data, "livemode": true,
            "account": ACCOUNT, "pending_webhooks": 1, "type": event_type })
    }

    /// Renders the same event for an endpoint with other expansions. (An endpoint with the period
    /// in another place would also nest the previous attributes differently, which is not
    /// simulated.)
    fn rendered_differently(&mut self, body: &Value, model: &Model) -> Value {
        let mut body = body.clone();
        let shape = Shape {
            customer_expanded: !self.shape.customer_expanded,
            ..self.shape
        };
        body["data"]["object"] = model.render(shape);
        body["pending_webhooks"] = json!(3);
        body
    }
}

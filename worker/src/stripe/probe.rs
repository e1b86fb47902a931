//! A single request to Stripe's API, without retries.
//!
//! For a person who wants to know now whether a call works.

use std::time::Duration;

use reqwest::Method;
use time::OffsetDateTime;

use super::api::{self, ApiError, Call, Content, StripeApi};
use super::path::Path;
use crate::clocks::Reading;

/// How long Stripe may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// What came of a request.
pub(crate) struct Reply {
    pub(crate) answer: Result<(), ApiError>,
    /// Stripe's clock.
    pub(crate) clock: Option<Reading>,
}

impl StripeApi {
    /// Sends one GET and ignores what the answer contains.
    pub(crate) async fn probe(&self, path: Path<'_>) -> Reply {
        let request = match self.request(&Call::new(Method::GET, path, Content::None)) {
            Ok(request) => request,
            Err(error) => {
                return Reply {
                    answer: Err(error),
                    clock: None,
                };
            }
        };
        let began = OffsetDateTime::now_utc();
        let response = match request.timeout(ANSWER_MAX).send().await {
            Ok(response) => response,
            Err(error) => {
                return Reply {
                    answer: Err(ApiError::Transport(error.without_url())),
                    clock: None,
                };
            }
        };
        let ended = OffsetDateTime::now_utc();
        let status = response.status();
        let is_error_of_any = status.is_redirection() || status.is_server_error();
        // Any web server may answer so.
        if !is_error_of_any && !api::has_request_id(&response) {
            return Reply {
                answer: Err(ApiError::Answer {
                    problem: "it has no Request-Id, so another server may have sent it",
                    request_id: "unknown".to_owned(),
                }),
                clock: None,
            };
        }
        let answer = match status {
            status if status.is_redirection() => Err(ApiError::Redirected),
            status if status.is_success() => Ok(()),
            _ => Err(api::status_error(&response)),
        };
        let clock = api::date(&response).map(|at| Reading::new("Stripe", at, began, ended));
        Reply { answer, clock }
    }
}

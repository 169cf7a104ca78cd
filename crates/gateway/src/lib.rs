//! An API gateway from one file: the program `portcullis`, in pieces that can be tested.
//!
//! ```toml
//! [services.orders]
//! endpoints = ["127.0.0.1:9001", "127.0.0.1:9002"]
//! [[routes]]
//! path = "/{*rest}"
//! to = "orders"
//! ```
//!
//! `portcullis run --config gateway.toml` runs that at 127.0.0.1:8080, with a page for operators at 127.0.0.1:9901.
//! `gateway.example.toml` beside this crate says everything a file can say; `portcullis check` says what is wrong with one.
//!
#![doc = include_str!("../transcript.md")]
//!
//! # Reload
//!
//! On `HUP`, on `POST /reload` at the operators' side, and with `server.watch` when the file changes, or a secret, key or
//! certificate that it names, the file is read again. What it says is built beside what runs and put in force in one step, or refused whole. Layers that it says nothing
//! new of are taken over with all they know: counters, breakers, latencies, limits, connections. What a registry said is last
//! known good for the one that takes its place, with another token or at another address, until that answers, and for
//! services that are to be talked to otherwise; and listeners are registered there before they leave the other. Four clients without a pause
//! lose none of some 1,300 requests during thirty reloads
//! (`cargo test -p portcullis-gateway --test reload nothing_is_lost -- --nocapture`). Requests under way end by
//! the layers they began with. Listeners show new certificates to whoever connects from then on, and connections go on with
//! those they began with. What else is said of listeners (addresses, limits, times, registration), whether and where operators
//! are served, threads, the log's format and the time to drain count from the next start; the answer says so when they differ.
//!
//! # Operators
//!
//! At `admin.address`, by default 127.0.0.1:9901, on a listener of its own:
//!
//! | | |
//! |---|---|
//! | `GET /` | the page: routes, services, endpoints and what happens, with no part from elsewhere |
//! | `GET /live` | 200 while it runs |
//! | `GET /ready` | 200; 503 before each service that a route leads to is known, and from the first word of an end |
//! | `GET /metrics` | the [metrics](#metrics) |
//! | `GET /config` | the file as it is understood, defaults included, secrets masked |
//! | `GET /endpoints`, `/state` | services and endpoints; everything the page shows |
//! | `POST /reload` | reads the file again |
//! | `POST /drain` | ends it, as `TERM` does |
//! | `POST /breaker` | `{"service": …, "endpoint": …, "state": "open" \| "closed" \| "auto"}`; without an endpoint, all of the service, whatever single ones were told and also those still to come. Other files leave what is held so |
//! | `POST /register` | `{"service": …, "address": "host:port"}`, and perhaps `id`, `weight`, `zone`, `tags`, `metadata`, `https`: an instance in the embedded registry; with `"ttl": "30s"` until that is over, unless it comes again. `registry` names one of several |
//! | `POST /deregister` | `{"service": …, "id": …}` |
//! | `POST /log` | `{"level": "warn,access=info,portcullis_forward=debug"}` until the next start or reload of another level |
//!
//! What changes something needs `admin.writable`, and `admin.token` as a bearer token if there is one; a file that allows it
//! beyond this machine without a token is refused, also where that is because of the address of the start. Pages from
//! elsewhere can neither order (their `Origin` is another) nor, where only this machine is listened to, read under a name of
//! their own that points here (their `Host` is neither `localhost` nor an address).
//!
//! # The page
//!
//! At the top, of the last ten seconds: requests a second over a chart of two minutes, the share of errors, refusals, within
//! what time half of them and 99 % were done, what is under way, and how many endpoints are well. Below it the map: a box for
//! each route, service and endpoint with its rate, joined by lines that move while requests pass; what ails has a sign, a word
//! and a colour (amber for a service of which only some endpoints are well and for what is held by hand, red for an open
//! breaker, a failed check or a route with errors), and so has the line that leads there. A click on a box, or Enter, shows
//! only what belongs to it. Then tables: routes; of each service its endpoints with state, rate, errors, latencies, what is in
//! flight, breaker and connections; limits and who refused how many and why; and the last events: breakers that moved,
//! endpoints that came and went, reloads. Where the file lets it, endpoints are taken out and let in again, the file is
//! reloaded, and the gateway drained. Everything can be done with the keyboard (`?` says how), in the dark and in the light, on
//! a telephone as well; `PORTCULLIS_PICTURES=/tmp cargo test -p portcullis-gateway --test page` takes pictures.
//!
//! # Metrics
//!
//! In Prometheus' text format, with OpenTelemetry's names and buckets where it has them. Labels come from the file, from
//! registries, and from fixed words: the route's name or pattern, never the path; methods that callers make up are `_OTHER`,
//! and so is every method of what route, auth or rate-limit refused, by which strangers could multiply series; beyond 2,000
//! series of requests further ones are counted in one, of the route `_overflow`.
//!
//! | | labels |
//! |---|---|
//! | `http_server_request_duration_seconds`, to the end of the answer | `http_request_method`, `http_response_status_code` (499: the caller left before there was one), `http_route`, `rpc_grpc_status_code`, `error_type` (why it was refused, or what failed), `portcullis_layer` (who refused) |
//! | `http_server_active_requests`; `portcullis_route_bytes_total` | ; route, direction |
//! | `portcullis_service_endpoints` | service, state: admitting, refusing, half-open, open, sick, held |
//! | `portcullis_service_bytes_total`, `portcullis_retry_budget` | service, direction; service |
//! | `portcullis_breaker_changes_total` | service, to, reason |
//! | `portcullis_registry_age_seconds`, `portcullis_registry_answers_total` | service; and result |
//! | `portcullis_attempt_duration_seconds`, `portcullis_endpoint_{picks,errors,failures,retried}_total`, `portcullis_endpoint_in_flight` | service, endpoint |
//! | `portcullis_breaker_state`, `portcullis_breaker_{failures,refused}_total`, `portcullis_health_well` | service, endpoint |
//! | `portcullis_pool_connections` | service, endpoint, state: open, idle, http2 |
//! | `portcullis_rate_limit_decisions_total`, `portcullis_rate_limit_{callers,places,in_flight}` | decision |
//! | `portcullis_rate_limit_store_{questions,decisions}_total`, `portcullis_rate_limit_store_up`, with `limiter.redis` | result; by |
//! | `portcullis_key_set_age_seconds`, `portcullis_key_set_fetches_total` | provider; and result |
//! | `portcullis_token_cache_lookups_total`, `portcullis_token_cache_bytes` | provider, result; provider |
//! | `portcullis_spans_total`, `portcullis_config_reloads_total` | result |
//! | `portcullis_ready`, `portcullis_uptime_seconds`, `portcullis_log_dropped_total`, `portcullis_build_info` | the last: version |
//!
//! They are read from the layers' handles when they are asked for. The `metrics` façade would be told of each event instead,
//! and would keep the series of endpoints that are gone until the process ends; where instances come and go by the hour that
//! has no bound.
//!
//! # The access log
//!
//! A line for each request on standard error, as text or JSON, at its end: `method`, `path` (without the query), `route`,
//! `status`, `grpc_status`, `service`, `endpoint`, `attempts`, `refused_by` and `reason`, `bytes_in`, `bytes_out`, whether it was `complete`,
//! `peer`, `trace` and `span`; and how long each stage took: `auth_ms` (the route included), `limit_ms`, `discovery_ms`,
//! `balance_ms`, `upstream_ms` (all attempts), `body_ms`, which together are `total_ms`, and `head_ms` from the start to the
//! head of the answer. What a request did not come to is left out, as is `status` when the caller left before there was one. Of requests that succeed a share can be written; those that fail all are. No header is ever written. A
//! thread of its own writes; when whoever reads is slower than requests come, lines are left out and counted.
//!
//! # Traces
//!
//! A caller's `traceparent` goes on, or a trace begins here, and the upstream gets it. With the feature `otlp` and
//! `traces.otlp` in the file, each sampled request becomes a server span and each attempt a client span below it, by
//! OpenTelemetry's conventions for HTTP, sent as OTLP over HTTP; the upstream's parent is the attempt that reached it.
//! Whether a trace is sampled its caller has decided, or else `traces.sample`, by the trace's id, so that gateways agree.
//! Spans wait in a queue of bounded length: a collector that is slow or gone costs spans, never requests, and is asked again
//! when it says that it has no time.
//!
//! # The end
//!
//! `TERM`, `INT` and `POST /drain` make it not ready, and take off what `listeners.<name>.register` registered. After
//! `server.drain_delay` the listeners close, requests under way have `server.drain_timeout`, less what the last spans and
//! lines may take (a quarter, at most two seconds), and it exits with 0 within both together; a registry that does not
//! answer is waited for as long as those besides. A second signal ends it at once.
//!
//! | exit code | |
//! |---|---|
//! | 0 | ended as told, or the file is right |
//! | 1 | something it needs is not to be had: a port, a certificate that fits its key; or a second signal ended it |
//! | 2 | the command line or the file is wrong |

/// Prints a line. Nobody to read it is no reason to end.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

mod admin;
mod build;
pub mod config;
mod demo;
mod export;
mod listen;
mod log;
mod members;
mod notice;
mod observe;
mod run;
mod state;
mod telemetry;
mod token;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::Config;

/// An API gateway from one file.
#[derive(Parser)]
#[command(name = "portcullis", version, after_help = SMALL)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs what a file says
    #[command(after_help = SMALL)]
    Run {
        /// The file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Says everything that is wrong with a file
    Check {
        /// The file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Runs a gateway before three small backends, with nothing installed
    Demo,
    /// Prints a token to try with
    Token(Box<token::Arguments>),
    /// Prints the JSON schema of the file, from which editors complete
    Schema,
}

const SMALL: &str = "A small file:

    [services.orders]
    endpoints = [\"127.0.0.1:9001\", \"127.0.0.1:9002\"]
    [[routes]]
    path = \"/{*rest}\"
    to = \"orders\"
";

/// What the program does.
#[must_use]
pub fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run { config } => run::file(config),
        Command::Check { config } => check(&config),
        Command::Demo => demo::run(),
        Command::Token(arguments) => token::print(&arguments),
        Command::Schema => {
            say!("{:#}", Config::json_schema());
            ExitCode::SUCCESS
        }
    }
}

fn check(file: &std::path::Path) -> ExitCode {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("{mistakes}");
            return ExitCode::from(run::WRONG);
        }
    };
    let count = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let (services, routes) = (count(config.services.len(), "service"), count(config.routes.len(), "route"));
    // What only shows when it is put together: patterns that contradict each other, keys that do not fit.
    // Nothing is asked of anybody: what would run in it never does.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let _inside = runtime.as_ref().ok().map(tokio::runtime::Runtime::enter);
    match build::Running::build(config, None) {
        Ok(_) => {
            say!("{} is right: {services}, {routes}", file.display());
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{}: {why}", file.display());
            ExitCode::from(run::WRONG)
        }
    }
}

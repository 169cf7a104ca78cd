//! A line for each request.
//!
//! Written by hand: by way of `tracing`, which visits every field by itself, a line costs as much as half a request.

use portcullis_core::GrpcCode;

use super::Finished;
use crate::config::Log;
use crate::log::{Line, Name, name};

const HEAD: Name = Name { text: "  INFO access:", json: r#"","level":"INFO","target":"access""# };

/// Writes the line, unless the file wants none, or it is one of many that succeeded.
pub(super) fn log(finished: &Finished, log: &Log) {
    let Some(path) = finished.asked.path.as_deref().filter(|_| log.access) else { return };
    let head = finished.head.as_ref();
    let refused = head.and_then(|head| head.refused);
    let succeeded = finished.whole && refused.is_none() && !finished.is_failure();
    if succeeded && log.sample.0 < 1.0 && fastrand::f64() >= log.sample.0 {
        return;
    }
    if !tracing::enabled!(target: "access", tracing::Level::INFO) {
        return;
    }
    let first = finished.attempts.first().map(|attempt| attempt.began);
    let last = finished.attempts.last().map(|attempt| &attempt.endpoint);
    let stages = finished.record.stages(first, head.map(|head| head.after), finished.took);
    let mut line = Line::new(HEAD);
    line.text(name!("method"), finished.asked.method.as_str());
    line.text(name!("path"), path);
    line.maybe(name!("route"), finished.route().map(|route| &**route));
    line.number(name!("status"), head.map(|head| head.status.as_u16().into()));
    line.number(name!("grpc_status"), finished.grpc.map(GrpcCode::number).map(u64::from));
    line.maybe(name!("service"), last.map(|endpoint| &**endpoint.service()));
    line.maybe(name!("endpoint"), last.map(|endpoint| &**endpoint.id()));
    line.number(name!("attempts"), last.map(|_| finished.attempts.len() as u64));
    line.maybe(name!("refused_by"), refused.map(|(layer, _)| layer));
    line.maybe(name!("reason"), refused.map(|(_, reason)| reason));
    let times = [
        (name!("auth_ms"), stages.auth),
        (name!("limit_ms"), stages.limit),
        (name!("discovery_ms"), stages.discovery),
        (name!("balance_ms"), stages.balance),
        (name!("upstream_ms"), stages.upstream),
        (name!("head_ms"), head.map(|head| head.after)),
        (name!("body_ms"), stages.body),
        (name!("total_ms"), Some(finished.took)),
    ];
    for (name, time) in times {
        line.millis(name, time);
    }
    line.number(name!("bytes_in"), Some(finished.record.uploaded()));
    line.number(name!("bytes_out"), Some(finished.down));
    line.flag(name!("complete"), finished.whole);
    line.address(name!("peer"), finished.asked.peer);
    if let Some(trace) = finished.record.trace {
        line.plain(name!("trace"), &trace.id_digits());
        line.plain(name!("span"), &trace.span_digits());
    }
    line.write();
}

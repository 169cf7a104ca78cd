//! What a token must claim to be believed, once its signature holds.

use std::time::Duration;

use portcullis_core::{Identity, Proof};
use serde_json::{Map, Value};

use crate::authenticate::Denied;
use crate::key::base64url;

/// How far the clocks of an issuer and of this machine may differ, unless said otherwise.
pub const DEFAULT_LEEWAY: Duration = Duration::from_secs(60);

/// The largest leeway; more is cut down to it.
pub const MAX_LEEWAY: Duration = Duration::from_secs(300);

/// What is said of a token that another proof may well believe.
pub(crate) const OTHER_ISSUER: &str = "the token is from another issuer";

/// The last second of the year 9999: later dates are taken for mistakes.
const LAST_SECOND: f64 = 253_402_300_799.0;

/// The rules of one issuer.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) issuer: Option<String>,
    pub(crate) audiences: Vec<String>,
    pub(crate) leeway: Duration,
    pub(crate) max_age: Option<Duration>,
    pub(crate) expiry_optional: bool,
    pub(crate) access_tokens_only: bool,
    pub(crate) types: Vec<String>,
    pub(crate) required: Vec<String>,
    pub(crate) subject: String,
    pub(crate) roles: String,
}

/// A token's claims, believed.
pub(crate) struct Believed {
    pub(crate) identity: Identity,
    /// Since the epoch, leeway included. `None` for a token that never expires.
    pub(crate) until: Option<Duration>,
    /// The certificate the token is bound to ([RFC 8705](https://www.rfc-editor.org/rfc/rfc8705) §3).
    pub(crate) certificate: Option<[u8; 32]>,
}

// === impl Rules ===

impl Default for Rules {
    fn default() -> Self {
        Self {
            issuer: None,
            audiences: Vec::new(),
            leeway: DEFAULT_LEEWAY,
            max_age: None,
            expiry_optional: false,
            access_tokens_only: false,
            types: Vec::new(),
            required: Vec::new(),
            subject: "/sub".to_owned(),
            roles: "/roles".to_owned(),
        }
    }
}

impl Rules {
    /// Checks the claims of a token whose signature held.
    pub(crate) fn check(
        &self,
        typ: Option<&str>,
        claims: Map<String, Value>,
        now: Duration,
    ) -> Result<Believed, Denied> {
        self.check_type(typ)?;
        let claims = Value::Object(claims);
        let text = |name: &str| match &claims[name] {
            Value::Null if claims.get(name).is_none() => Ok(None),
            Value::String(text) => Ok(Some(text.as_str())),
            _ => Err(Denied::invalid("a claim is of the wrong type")),
        };
        let issuer = text("iss")?;
        if self.issuer.is_some() && issuer != self.issuer.as_deref() {
            return Err(Denied::invalid(OTHER_ISSUER));
        }
        self.check_audience(claims.get("aud"))?;
        let until = self.check_times(&claims, now)?;
        for name in &self.required {
            let claim = if name.starts_with('/') { claims.pointer(name) } else { claims.get(name) };
            if claim.is_none_or(Value::is_null) {
                return Err(Denied::invalid("the token lacks a claim"));
            }
        }
        text("sub")?;
        let subject = match claims.pointer(&self.subject) {
            Some(Value::String(subject)) if !subject.is_empty() && !subject.chars().any(char::is_control) => subject,
            _ => return Err(Denied::invalid("the token does not say whose it is")),
        };
        let certificate = bound_certificate(claims.get("cnf"))?;
        let scopes = scopes(&claims)?;
        let roles = match claims.pointer(&self.roles) {
            None => Vec::new(),
            // A role's name may have blanks.
            Some(Value::String(role)) => vec![role.clone()],
            Some(roles) => strings(roles).ok_or_else(|| Denied::invalid("a claim is of the wrong type"))?,
        };
        let mut identity = Identity::new(subject.as_str(), Proof::Jwt).with_scopes(scopes).with_roles(roles);
        if let Some(issuer) = issuer {
            identity = identity.with_issuer(issuer);
        }
        if let Value::Object(claims) = claims {
            identity = identity.with_claims(claims);
        }
        Ok(Believed { identity, until, certificate })
    }

    /// By default a token may leave its type open, or be `JWT` or an access token; of the kinds that mean something else,
    /// such as `logout+jwt` or `dpop+jwt`, none is taken for one.
    fn check_type(&self, typ: Option<&str>) -> Result<(), Denied> {
        let short = typ.map(|typ| match typ.get(..12) {
            Some(prefix) if prefix.eq_ignore_ascii_case("application/") => &typ[12..],
            _ => typ,
        });
        let is = |wanted: &str| short.is_some_and(|typ| typ.eq_ignore_ascii_case(wanted));
        let accepted = if self.access_tokens_only {
            is("at+jwt")
        } else if self.types.is_empty() {
            short.is_none() || is("JWT") || is("at+jwt")
        } else {
            self.types.iter().any(|wanted| is(wanted))
        };
        if accepted { Ok(()) } else { Err(Denied::invalid("the token is of another type")) }
    }

    /// RFC 7519 §4.1.3: who does not find itself in `aud` must reject, also when it was told no name of its own.
    fn check_audience(&self, claim: Option<&Value>) -> Result<(), Denied> {
        let other = || Denied::invalid("the token is for another audience");
        let accepted = match claim {
            None => self.audiences.is_empty(),
            Some(Value::String(audience)) => self.audiences.contains(audience),
            Some(Value::Array(audiences)) => {
                let names: Option<Vec<&str>> = audiences.iter().map(Value::as_str).collect();
                let names = names.ok_or_else(|| Denied::invalid("a claim is of the wrong type"))?;
                names.iter().any(|name| self.audiences.iter().any(|audience| audience == name))
            }
            Some(_) => return Err(Denied::invalid("a claim is of the wrong type")),
        };
        if accepted { Ok(()) } else { Err(other()) }
    }

    fn check_times(&self, claims: &Value, now: Duration) -> Result<Option<Duration>, Denied> {
        let (now, leeway) = (now.as_secs_f64(), self.leeway.as_secs_f64());
        let date = |name: &str| match claims.get(name) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_f64() {
                Some(seconds) if (0.0..=LAST_SECOND).contains(&seconds) => Ok(Some(seconds)),
                _ => Err(Denied::invalid("a date is out of range")),
            },
            Some(_) => Err(Denied::invalid("a claim is of the wrong type")),
        };
        let mut until = None;
        match date("exp")? {
            Some(exp) if now >= exp + leeway => return Err(Denied::invalid("the token expired")),
            Some(exp) => until = Some(exp + leeway),
            None if self.expiry_optional => {}
            None => return Err(Denied::invalid("the token never expires")),
        }
        if date("nbf")?.is_some_and(|nbf| nbf > now + leeway) {
            return Err(Denied::invalid("the token is not valid yet"));
        }
        let issued = date("iat")?;
        if issued.is_some_and(|iat| iat > now + leeway) {
            return Err(Denied::invalid("the token was issued in the future"));
        }
        if let Some(max_age) = self.max_age {
            let issued = issued.ok_or_else(|| Denied::invalid("the token does not say when it was issued"))?;
            let oldest = issued + max_age.as_secs_f64() + leeway;
            if now >= oldest {
                return Err(Denied::invalid("the token is too old"));
            }
            until = Some(until.map_or(oldest, |until: f64| until.min(oldest)));
        }
        Ok(until.and_then(|until| Duration::try_from_secs_f64(until).ok()))
    }
}

/// The thumbprint in `cnf`. A token bound in a way that is not checked here must not pass as if it were not bound.
fn bound_certificate(cnf: Option<&Value>) -> Result<Option<[u8; 32]>, Denied> {
    let Some(cnf) = cnf else { return Ok(None) };
    let unknown = || Denied::invalid("the token is bound in a way that is not known here");
    let cnf = cnf.as_object().filter(|cnf| cnf.len() == 1).ok_or_else(unknown)?;
    let thumbprint = cnf.get("x5t#S256").and_then(Value::as_str).and_then(base64url).ok_or_else(unknown)?;
    thumbprint.try_into().map(Some).map_err(|_| unknown())
}

/// `scope` as one string (RFC 8693 §4.2), else `scp` as a string or an array, as some providers write it.
fn scopes(claims: &Value) -> Result<Vec<String>, Denied> {
    let found = match (claims.get("scope"), claims.get("scp")) {
        (None, None) => Some(Vec::new()),
        (Some(scopes), _) | (None, Some(scopes)) => strings(scopes),
    };
    found.ok_or_else(|| Denied::invalid("a claim is of the wrong type"))
}

fn strings(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(words) => Some(words.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect()),
        Value::Array(values) => values.iter().map(|value| value.as_str().map(str::to_owned)).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => None,
    }
}
